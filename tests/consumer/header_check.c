/* The C interface must compile as plain C11 from the header alone, and every function must link. */
#include "twilight/c.h"

typedef void (*function)(void);

int main(void) {
  const function functions[] = {
      (function)twl_status_name,
      (function)twl_last_error,
      (function)twl_context_create,
      (function)twl_context_destroy,
      (function)twl_policy_init,
      (function)twl_index_record_bytes,
      (function)twl_index_sizes,
      (function)twl_index_view_init,
      (function)twl_append,
      (function)twl_seal,
      (function)twl_plan_create,
      (function)twl_plan_destroy,
      (function)twl_plan_workspace_bytes,
      (function)twl_decode,
      (function)twl_attend_prefill,
  };
  for (size_t i = 0; i < sizeof functions / sizeof functions[0]; ++i) {
    if (functions[i] == 0) return 1;
  }
  return twl_status_name(TWL_OK)[0] == 'o' && twl_last_error()[0] == '\0' ? 0 : 1;
}
