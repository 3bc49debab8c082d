# The two commands of the README, and shortcuts for daily work. CMake does the building.
BUILD ?= build/release
ARGS ?=

.PHONY: demo test program deps clean
demo: program
	$(BUILD)/bin/twilight demo $(ARGS)

test: deps
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure

program: deps
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release
	cmake --build $(BUILD) --target twilight_program

deps:
	@scripts/install_deps.sh

clean:
	rm -rf build
