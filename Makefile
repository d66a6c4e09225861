# cvms: make, make run, make check.  CC, CFLAGS, LDFLAGS, PREFIX and DESTDIR are yours.
# make TLS=0 builds without BearSSL; make BEARSSL=DIR links the one in DIR (headers in DIR/inc, library in DIR/build).
.POSIX:
CC = cc
CFLAGS = -O2
LDFLAGS =
PREFIX = /usr/local
TLS = 1
BEARSSL =
STRICT = -std=c11 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -DCVMS_TLS=$(TLS)
SOURCES = cvms.c proto_wire.h sha3.h
# What TLS and BEARSSL add to the command line.
BEAR = $$(test $(TLS) = 0 || { test -z "$(BEARSSL)" && echo -lbearssl || echo -isystem $(BEARSSL)/inc $(BEARSSL)/build/libbearssl.a; })

all: cvms

cvms: $(SOURCES)
	$(CC) $(STRICT) $(CFLAGS) -o $@ cvms.c $(LDFLAGS) $(BEAR)

# The main job, on files that ship in tests/: a server on a free loopback port, and a stand-in agent against it.
run: cvms
	sh tests/demo.sh ./cvms

# Every test; what they need is installed by tests/install.sh.
check:
	python3 tests/check.py

# The large cases of the checksum tests: files over 4 GiB, more than 65,535 files (some minutes).
check-large: cvms
	python3 tests/cli/test_checksum.py ./cvms tests/vectors

# A fully static, stripped binary: with musl where it is there and TLS=0 or BEARSSL=DIR names a library built for it.
static: $(SOURCES)
	cc=$$(command -v musl-gcc || echo $(CC)); test $(TLS) = 0 -o -n "$(BEARSSL)" || cc=$(CC); \
	$$cc $(STRICT) $(CFLAGS) -Os -ffunction-sections -fdata-sections -static -s -Wl,--gc-sections -o cvms cvms.c \
	    $(LDFLAGS) $(BEAR)

install: cvms
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	cp cvms $(DESTDIR)$(PREFIX)/bin/cvms

clean:
	rm -rf cvms build

.PHONY: all run check check-large static install clean
