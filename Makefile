# cvms: make, make run, make check.  CC, CFLAGS, LDFLAGS, PREFIX and DESTDIR are yours.
# make TLS=0 builds without BearSSL; make BEARSSL=DIR links the one in DIR (headers in DIR/inc, library in DIR/build);
# make PORTABLE=1 takes nothing of the system but ISO C and POSIX.1-2008; make O=DIR writes nothing but DIR.
.POSIX:
CC = cc
CFLAGS = -O2
LDFLAGS =
PREFIX = /usr/local
O = .
TLS = 1
PORTABLE = 0
BEARSSL =
STRICT = -std=c11 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -DCVMS_TLS=$(TLS) -DCVMS_PORTABLE=$(PORTABLE)
# Hardening, as far as the compiler has it, asked once of all together; make HARDEN= does without.
PROBE = printf '\043include <stdio.h>\nint main(void) { return 0; }' | $(CC) $(CFLAGS) -Werror
HARDEN = $$(set -- -fstack-protector-strong -fstack-clash-protection -fcf-protection -Wl,-z,relro,-z,now \
    -Wl,-z,noexecstack "-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2" "-fPIE -pie"; has() { $(PROBE) "$$@" -x c -o /dev/null - \
    2>/dev/null && echo "$$@"; }; has $$* || for f; do has $$f; done)
SOURCES = cvms.c proto_wire.h sha3.h
# What TLS and BEARSSL add to the command line.
BEAR = $$(test $(TLS) = 0 || { test -z "$(BEARSSL)" && echo -lbearssl || echo -isystem $(BEARSSL)/inc $(BEARSSL)/build/libbearssl.a; })

# A header that is not there is a library that is not there: what to do about it, in a line.
HAS_BEAR = test $(TLS) = 0 -o -n "$(BEARSSL)" || printf '\043include <bearssl.h>\n' | $(CC) $(CFLAGS) -E -x c - >/dev/null 2>&1 || \
    { echo "bearssl.h is not there: install libbearssl-dev (Debian) or bearssl-dev (Alpine), name a build of it with" \
    "make BEARSSL=DIR, or do without TLS: make TLS=0" >&2; exit 1; }

# A target's name has no blanks: GNU make says so at once.
BLANKS = $(if $(word 2,$(O)),$(error O=$(O): the name of that folder can't have a blank; O=DIR may be relative))

all: $(BLANKS)$(O)/cvms

# Changes when what is built changes, so that make TLS=0 behind make builds anew.
$(O)/build/flags: FORCE
	@mkdir -p $(O)/build; f='$(CC) $(CFLAGS) $(LDFLAGS) TLS=$(TLS) $(PORTABLE) $(BEARSSL)'; \
	test -f $@ && test "$$(cat $@)" = "$$f" || printf '%s\n' "$$f" >$@

FORCE:

$(O)/cvms: $(SOURCES) $(O)/build/flags
	@$(HAS_BEAR)
	@set -- $(CC) $(STRICT) $(HARDEN) $(CFLAGS) -o $@ cvms.c $(LDFLAGS) $(BEAR); echo "$$*"; "$$@"

# The main job, on files that ship in tests/: a server on a free loopback port, and a stand-in agent against it.
run: $(O)/cvms
	sh tests/demo.sh $(O)/cvms

# The quick tests, in under a minute; python3 tests/check.py LAYER/FILE runs one file.
test:
	python3 tests/check.py --quick

# Every test; what they need is installed by tests/install.sh.
check:
	python3 tests/check.py

# What other systems lack: compiled for them by the cross compiler of PyPI's ziglang.
check-systems:
	test -x build/tools/zig/bin/python || { python3 -m venv build/tools/zig && build/tools/zig/bin/pip install -q ziglang; }
	for system in x86_64-macos aarch64-macos x86_64-freebsd x86_64-netbsd x86_64-openbsd; do \
	    for portable in 0 1; do \
	        build/tools/zig/bin/python -m ziglang cc -target $$system $(STRICT) -Werror -UCVMS_TLS -DCVMS_TLS=0 \
	            -UCVMS_PORTABLE -DCVMS_PORTABLE=$$portable -c -o build/cvms-$$system.o cvms.c || exit 1; \
	    done; \
	done

# The same on other machines under qemu; tests/install.sh cross installs the compilers.  make check does i386 and s390x.
check-cross:
	python3 tests/check.py cross-all

# The large cases of the checksum tests: files over 4 GiB, more than 65,535 files; an upload of 10 GiB (some minutes).
check-large: $(O)/cvms
	python3 tests/cli/test_checksum.py $(O)/cvms tests/vectors
	python3 tests/deliver/test_deliver.py $(O)/cvms $(O)/cvms build/tools/bin/agent --large

# Every call of libc that can fail, failed in turn over whole runs (some minutes); make check takes a sample.
inject:
	python3 tests/check.py inject-all

# Static analysis, without a finding: cppcheck, clang's analyzer (scan-build runs the same) and gcc's, the last of which
# takes minutes and 3 GB.  A suppression stands in the source with its reason.
analyze: cppcheck
	for tls in 1 0; do \
	    clang --analyze -Werror -Xclang -analyzer-output=text -std=c11 -DCVMS_TLS=$$tls -o /dev/null cvms.c && \
	    gcc -fanalyzer -Werror -O1 -std=c11 -DCVMS_TLS=$$tls -c -o /dev/null cvms.c || exit 1; \
	done

cppcheck:
	for tls in 1 0; do \
	    cppcheck --std=c11 --enable=warning,performance,portability --inline-suppr --error-exitcode=1 --quiet \
	        -D__linux__ -D__x86_64__ -D__GNUC__ -DCVMS_TLS=$$tls cvms.c || exit 1; \
	done

# What the tests reach, with clang's counters; python3 tests/coverage/coverage.py --missing lists what they do not.
coverage:
	python3 tests/coverage/coverage.py

# Fuzzes all that reads foreign bytes, FUZZ_SECONDS a target and engine: libFuzzer, which is clang's, and AFL++ where it is
# installed (apt-get install afl++).  What it finds goes to build/fuzz/found; see tests/fuzz/fuzz.py.
FUZZ_SECONDS = 60
fuzz:
	BEARSSL='$(BEARSSL)' python3 tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

# Every figure beside a grpc-go server that does the same job, in one table, also in build/bench.md.
bench:
	python3 tests/bench/bench.py CC='$(CC)' BEARSSL='$(BEARSSL)'

# A fully static, stripped binary, as small as it gets: with musl where it is there and TLS=0 or BEARSSL=DIR names a
# library built for it.
static: $(SOURCES)
	@$(HAS_BEAR)
	@mkdir -p $(O)/build; echo static >$(O)/build/flags
	@cc=$$(command -v musl-gcc || echo $(CC)); test $(TLS) = 0 -o -n "$(BEARSSL)" || cc=$(CC); \
	set -- $$cc $(STRICT) $(CFLAGS) -Os -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-pie -no-pie \
	    -static -s -Wl,--gc-sections,-z,noseparate-code -o $(O)/cvms cvms.c $(LDFLAGS) $(BEAR); echo "$$*"; "$$@"

# The manual page is made of what -help prints: headings, names in columns 3 to 29, texts from column 31 on.
MAN = awk 'function safe(s) { gsub(/\\/, "\\e", s); gsub(/-/, "\\-", s); gsub(/^ +| +$$/, "", s); return "\\&" s } \
    NR == 1 { sub(/ [0-9.]*:/, " -"); print ".TH CVMS 1\n.SH NAME\n" safe($$0); next } \
    /^$$/ { print ".PP"; next } \
    /^[A-Z].*:$$/ { print ".SH " safe(substr($$0, 1, length - 1)); next } \
    /^  [^ ]/ { cut = substr($$0, 30, 1) == " " && substr($$0, 31, 1) != " "; \
        print ".TP\n.B " safe(cut ? substr($$0, 3, 27) : substr($$0, 3)); if (cut) print safe(substr($$0, 31)); next } \
    { print safe($$0) }'

install: $(O)/cvms
	mkdir -p "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/man/man1"
	cp $(O)/cvms "$(DESTDIR)$(PREFIX)/bin/cvms"
	$(O)/cvms -help >$(O)/build/help && $(MAN) $(O)/build/help >"$(DESTDIR)$(PREFIX)/share/man/man1/cvms.1" || \
	    echo "no manual page: this machine does not run $(O)/cvms" >&2

# One tar of what is here, in build/.
dist:
	v=cvms-$$(sed -n 's/^#define CVMS_VERSION "\(.*\)"/\1/p' cvms.c); rm -rf $(O)/build/$$v; mkdir -p $(O)/build/$$v && \
	cp -R $(SOURCES) Makefile README.md tests .ci .gitignore $(O)/build/$$v && \
	find $(O)/build/$$v -name __pycache__ -prune -exec rm -rf {} + && \
	tar -C $(O)/build -cf $(O)/build/$$v.tar $$v && rm -rf $(O)/build/$$v

clean:
	rm -rf $(O)/cvms $(O)/build

.PHONY: FORCE all run test check check-systems check-cross check-large inject analyze cppcheck coverage fuzz bench static install dist clean
