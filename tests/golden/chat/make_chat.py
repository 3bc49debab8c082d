#!/usr/bin/env python3
"""Writes chat.json: conversations as transformers' apply_chat_template renders them.

    pip install transformers && make_chat.py [--out FILE]

The templates are those of the families' checkpoints, without tools. `null` for a conversation that a template refuses.
"""
import argparse
import json
import pathlib

import jinja2
import tokenizers
import transformers

FOR = "{% for message in messages %}"
END = "{% endfor %}"
ALTERNATE = ("{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate') }}{% endif %}")
SPLIT = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
         "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
         "{% set system_message = SYSTEM %}{% endif %}")
CHATML = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
CHATML_ADD = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.")


def default_system(text):
    return ("{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + text +
            "<|im_end|>\n' }}{% endif %}")


def llama3(first, rest):
    turn = ("{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
            "+ message['content'] | trim + '<|eot_id|>' %}")
    return (first + rest + turn + "{% if loop.index0 == 0 %}{% set content = START + content %}{% endif %}{{ content }}" + END +
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def mistral(user_open, user_close, answer, system=None, last=False):
    if system is None:
        head = "{{ bos_token }}" + FOR + ALTERNATE
        user = "{{ '" + user_open + "' + message['content'] + '" + user_close + "' }}"
        refuse = "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    else:
        head = (SPLIT.replace("{% set system_message = SYSTEM %}", "") + "{{ bos_token }}{% for message in loop_messages %}" + ALTERNATE)
        user = ("{% if " + ("loop.last" if last else "loop.first") + " and system_message is defined %}{{ '" + user_open +
                "' + system_message + '\n\n' + message['content'] + '" + user_close + "' }}{% else %}{{ '" + user_open +
                "' + message['content'] + '" + user_close + "' }}{% endif %}")
        refuse = ""
    return (head + "{% if message['role'] == 'user' %}" + user + "{% elif message['role'] == 'assistant' %}{{ " + answer + " }}" +
            refuse + "{% endif %}" + END)


# name: template, bos, eos
TEMPLATES = {
    "chatml": (FOR + CHATML + END + CHATML_ADD, "", "<|im_end|>"),
    "qwen2": (FOR + default_system("You are a helpful assistant.") + CHATML + END + CHATML_ADD, "", "<|im_end|>"),
    "qwen2.5": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {{- '" + QWEN25_SYSTEM + "' }}\n"
        "    {{- \"<|im_end|>\\n\" }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
        "        {{- '<|im_start|>system\\n" + QWEN25_SYSTEM + "<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if not (message.role == 'system' and loop.first) %}\n"
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n", "", "<|im_end|>"),
    "qwen3": (
        "{%- set ns = namespace(last_query_index=messages|length - 1, found=false) %}"
        "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}"
        "{%- endfor %}{%- for message in messages %}{%- set content = message.content %}{%- if message.role != 'assistant' %}"
        "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- else %}{%- set reasoning = '' %}"
        "{%- if '</think>' in content %}"
        "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}"
        "{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}", "", "<|im_end|>"),
    "smollm2": (FOR + default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face") + CHATML + END +
                CHATML_ADD, "<|im_start|>", "<|im_end|>"),
    "llama-2": (
        SPLIT.replace("SYSTEM", "false") + "{% for message in loop_messages %}" + ALTERNATE +
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}", "<s>", "</s>"),
    "llama-3": (llama3("{% set loop_messages = messages %}", "{% for message in loop_messages %}").replace("START", "bos_token"),
                "<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.1": (llama3(
        SPLIT.replace("SYSTEM", "''") + "{%- set date_string = \"26 Jul 2024\" %}{{- bos_token }}"
        "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}{{- \"Cutting Knowledge Date: December 2023\\n\" }}"
        "{{- \"Today Date: \" + date_string + \"\\n\\n\" }}{{- system_message | trim }}{{- \"<|eot_id|>\" }}",
        "{% for message in loop_messages %}").replace("START", "''"), "<|begin_of_text|>", "<|eot_id|>"),
    "mistral-7b-v0.1": (mistral("[INST] ", " [/INST]", "message['content'] + eos_token + ' '"), "<s>", "</s>"),
    "mistral-7b-v0.2": (mistral("[INST] ", " [/INST]", "message['content'] + eos_token"), "<s>", "</s>"),
    "mistral-v1": (mistral(" [INST] ", " [/INST]", "' ' + message['content'] + eos_token", "first"), "<s>", "</s>"),
    "mistral-v3": (mistral("[INST] ", "[/INST]", "' ' + message['content']|trim + eos_token", "last", last=True), "<s>", "</s>"),
    "mistral-nemo": (mistral("[INST]", "[/INST]", "message['content']|trim + eos_token", "last", last=True), "<s>", "</s>"),
    "vicuna": (
        SPLIT.replace("SYSTEM", "'" + VICUNA_SYSTEM + "'") + "{{ bos_token }}{% for message in loop_messages %}" + ALTERNATE +
        "{% if loop.index0 == 0 %}{{ system_message }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ ' USER: ' + message['content'].strip() }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}", "<s>", "</s>"),
    "vicuna-lines": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'].strip() + '\n\n' %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = '' %}{% endif %}{{ bos_token + system_message }}{% for message in loop_messages %}" + ALTERNATE +
        "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'].strip() + '\n' }}{% else %}"
        "{{ 'ASSISTANT: ' + message['content'].strip() + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}", "<s>", "</s>"),
    "zephyr": (
        FOR + "\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n" + END, "<s>", "</s>"),
    "gemma-2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + FOR +
        ALTERNATE + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}" + END +
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}", "<bos>", "<eos>"),
    "gemma-3": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}"
        "{%- endif -%}{%- for message in loop_messages -%}" + ALTERNATE +
        "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}{{ message['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}",
        "<bos>", "<eos>"),
}


def message(role, content):
    return {"role": role, "content": content}


SYSTEM = message("system", "Answer in one line.")
CONVERSATIONS = [
    [message("user", "Who wrote Emma?")],
    [SYSTEM, message("user", "Who wrote Emma?")],
    [message("user", " padded \n"), message("assistant", "\tyes "), message("user", "it's \"two\"\nlines")],
    [SYSTEM, message("user", "a"), message("assistant", "b"), message("user", " c"), message("assistant", "d"), message("user", "e")],
    [message("user", "a"), message("assistant", "<think>\nlong\n</think>\n\nb"), message("user", "c")],
    [message("user", "a"), message("assistant", "b")],
    [message("assistant", "first"), message("user", "a")],
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("chat.json"))
    args = parser.parse_args()
    families = []
    for name, (template, bos, eos) in TEMPLATES.items():
        raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, eos_token=eos,
                                                         **({"bos_token": bos} if bos else {}))
        cases = []
        for messages in CONVERSATIONS:
            for add in (False, True) if messages[-1]["role"] == "user" else (False,):
                try:
                    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
                except jinja2.exceptions.TemplateError:
                    text = None
                cases.append({"messages": messages, "add_generation_prompt": add, "text": text})
        families.append({"name": name, "template": template, "bos": bos, "eos": eos, "cases": cases})
    args.out.write_text(json.dumps(families, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
