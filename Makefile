# cvms: make, make run, make check.  CC, CFLAGS, LDFLAGS, PREFIX and DESTDIR are yours.
.POSIX:
CC = cc
CFLAGS = -O2
LDFLAGS =
PREFIX = /usr/local
STRICT = -std=c11 -Wall -Wextra -Wpedantic -Wconversion -Wshadow
SOURCES = cvms.c proto_wire.h sha3.h

all: cvms

cvms: $(SOURCES)
	$(CC) $(STRICT) $(CFLAGS) -o $@ cvms.c $(LDFLAGS)

# The main job, on files that ship in tests/: a server on a free loopback port, and a stand-in agent against it.
run: cvms
	sh tests/demo.sh ./cvms

# Every test; what they need is installed by tests/install.sh.
check:
	python3 tests/check.py

# A fully static, stripped binary, with musl where it is there.
static: $(SOURCES)
	cc=$$(command -v musl-gcc || echo $(CC)); \
	$$cc $(STRICT) $(CFLAGS) -static -s -o cvms cvms.c $(LDFLAGS)

install: cvms
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	cp cvms $(DESTDIR)$(PREFIX)/bin/cvms

clean:
	rm -rf cvms build

.PHONY: all run check static install clean
