#!/bin/sh
# The device's library, beside the Python that calls it.
cd "$(dirname "$0")" && ${CC:-cc} -O2 -Wall -Wextra -shared -fPIC -o porthal_flint/libflint.so device.c -lm -lpthread
