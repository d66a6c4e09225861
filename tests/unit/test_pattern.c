/* Tests of the patterns of cvms.c (-reject): a table of what each finds, what is refused and why, lines of a mebibyte
 * that would take regexec hours, and thousands of random patterns against regexec. */
#define main cvms_main
#include <regex.h>
#include <stdio.h>
#include "../../cvms.c"
#undef main

static unsigned passed, failed;

static void check(bool ok, const char *pattern, const char *text, const char *what)
{
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("test_pattern.c: \"%s\" and \"%.60s\": %s\n", pattern, text, what);
}

static struct pattern *made(const char *pattern, const char **why)
{
    struct pattern *p = calloc(1, sizeof *p);
    if (!p)
        exit(2);
    *why = pattern_compile(p, pattern);
    return p;
}

/* What is found, as the line; "-" if nothing is. */
static void finds(const char *pattern, struct bytes text, struct bytes wanted)
{
    const char *why;
    struct pattern *p = made(pattern, &why);
    struct bytes line;
    check(!why, pattern, why ? why : "", "is refused");
    for (int twice = 0; twice < 2 && !why; twice++) {   /* the second time with the states that the first made */
        bool found = pattern_find(p, text, &line);
        check(found ? bytes_eq(line, wanted) : bytes_eq(wanted, BYTES("-")), pattern, (const char *)text.p,
              found ? "found something else" : "found nothing");
    }
    free(p);
}

static void table(void)
{
    static const struct {
        const char *pattern, *text, *line;
    } rows[] = {
        { "b", "abc", "abc" }, { "b", "ac", "-" }, { "b", "a\nb\nc", "b" }, { "^b$", "a\nbb\nb", "b" },
        { "^$", "", "" }, { "^$", "a\n\nb", "" }, { "^$", "a\n", "-" }, { "a.c", "a\nc", "-" },
        { "a.c", "a\xc3\xa9" "c", "a\xc3\xa9" "c" }, { "^a.c$", "a\xff" "c", "a\xff" "c" },
        { "[^b]", "b\nb", "-" }, { "a[^b]", "a\n", "-" },
        { "^\xc3\xa9$", "\xc3\xa9\xc3\xa9\n\xc3\xa0", "-" },
        /* repetition */
        { "^ab*c$", "ac", "ac" }, { "^ab+c$", "ac", "-" }, { "^ab+c$", "abbc", "abbc" },
        { "^ab?c$", "abbc", "-" }, { "^ab?c$", "ac", "ac" }, { "^a{3}$", "aa", "-" },
        { "^a{3}$", "aaa", "aaa" }, { "^a{3}$", "aaaa", "-" }, { "^a{2,}$", "a", "-" },
        { "^a{2,}$", "aaaaa", "aaaaa" }, { "^a{1,3}$", "aaaa", "-" }, { "^a{1,3}$", "a", "a" },
        { "^a{,2}b", "aab", "aab" }, { "^a{,2}b", "aaab", "-" }, { "^xa{0}y$", "xy", "xy" },
        { "^xa{0}y$", "xay", "-" }, { "^(ab){2}$", "abab", "abab" }, { "^(ab|c){2,3}$", "cabc", "cabc" },
        { "^(ab|c){2,3}$", "ccab" "c", "-" }, { "x(a*)*y", "xaaay", "xaaay" }, { "^x(a|b*)+y$", "xy", "xy" },
        { "^(a{2}){3}$", "aaaaaa", "aaaaaa" }, { "^a+?b$", "b", "b" },
        /* alternation, groups */
        { "^(a|bc|d)$", "bc", "bc" }, { "^(a|bc|d)$", "d", "d" }, { "^(a|bc|d)$", "bd", "-" },
        { "^a|b$", "ax", "ax" }, { "^a|b$", "xb", "xb" }, { "^a|b$", "xax", "-" }, { "a)", "xa)", "xa)" },
        { "((((a))))", "a", "a" }, { "x(^a)", "xa", "-" }, { "(^|,)a(,|$)", "b,a,c", "b,a,c" },
        { "(^|,)a(,|$)", "a", "a" }, { "(^|,)a(,|$)", "b,ab", "-" },
        /* brackets */
        { "^[a-c]$", "b", "b" }, { "^[a-c]$", "d", "-" }, { "^[]a]$", "]", "]" }, { "^[^]a]$", "]", "-" },
        { "^[a-]$", "-", "-" }, { "^[a-]$", "x", "-" }, { "^[-a]+$", "-a", "-a" },
        { "^[[:digit:]x]+$", "1x2", "1x2" }, { "^[^[:space:]]$", "\t", "-" }, { "^[[.a.]-[.c.]]$", "b", "b" },
        { "^[[=a=]]$", "a", "a" }, { "^[.*]$", "*", "*" }, { "^[.*]$", "a", "-" }, { "^[\\n]$", "\\", "\\" },
        { "^[\xc3\xa0-\xc3\xbf]$", "\xc3\xa9", "\xc3\xa9" }, { "^[\xc3\xa0-\xc3\xbf]$", "\xc4\x80", "-" },
        { "^[[:cntrl:]]$", "\x7f", "\x7f" }, { "^[[:punct:]]{4}$", "!:[~", "!:[~" },
        { "^[[:xdigit:]]+$", "fF0", "fF0" }, { "^[[:blank:]]$", "\r", "-" },
        { "^[[:upper:]][[:lower:]]$", "Aa", "Aa" }, { "^[[:graph:]]$", " ", "-" },
        { "^[[:print:]]$", " ", " " }, { "^[[:alnum:]]$", "_", "-" }, { "^[[:alpha:]]$", "0", "-" },
        /* escapes */
        { "\\.", "a", "-" }, { "\\.", "a.", "a." }, { "^\\^\\$\\{$", "^${", "^${" },
        { "^\\w+$", "a_9", "a_9" }, { "\\W", "a_9", "-" }, { "^\\d\\D$", "1a", "1a" },
        { "^\\d\\D$", "11", "-" }, { "a\\sb", "a b", "a b" }, { "a\\Sb", "a b", "-" },
        { "\\bpanic\\b", "a panic!", "a panic!" }, { "\\bpanic\\b", "panics", "-" }, { "\\<a", "ba", "-" },
        { "\\<a", "b a", "b a" }, { "a\\>", "ab", "-" }, { "a\\>", "a", "a" }, { "a\\Bb", "ab", "ab" },
        { "a\\B", "a", "-" },
    };
    for (size_t i = 0; i < PB_COUNT(rows); i++)
        finds(rows[i].pattern, bytes_of(rows[i].text), bytes_of(rows[i].line));
    finds("[[:cntrl:]]b", BYTES("a\0b"), BYTES("a\0b"));
}

static void refused(void)
{
    static const char *const rows[][2] = {
        { "", "an empty alternative" }, { "a|", "an empty alternative" }, { "|a", "an empty alternative" },
        { "()", "an empty alternative" }, { "a(|b)", "an empty alternative" }, { "(a", "\"(\" without" },
        { "((a)", "\"(\" without" }, { "[a", "\"[\" without" }, { "[]", "\"[\" without" },
        { "[", "\"[\" without" }, { "[a-", "\"[\" without" }, { "[z-a]", "a range" },
        { "[[:foo:]]", "no such character class" }, { "[[:alpha]]", "no such character class" },
        { "[[:alphadigit:]]", "no such character class" },
        { "[+-[:digit:]]", "a range can't end" }, { "[a-[:", "a range can't end" },
        { "[[.ab.]]", "a collating element" }, { "[:alpha:]", "a character class stands" },
        { "*a", "nothing to repeat" }, { "a|*b", "nothing to repeat" }, { "(+a)", "nothing to repeat" },
        { "{2}", "nothing to repeat" }, { "^*", "nothing to repeat" }, { "a$+", "nothing to repeat" },
        { "\\b{2}", "nothing to repeat" }, { "a{", "a repetition is" }, { "a{}", "a repetition is" },
        { "a{x}", "a repetition is" }, { "a{1", "a repetition is" }, { "a{1,2", "a repetition is" },
        { "a{2,1}", "a repetition whose" }, { "a{256}", "it repeats over 255" },
        { "a{1,256}", "it repeats over 255" }, { "a\\", "a backslash" }, { "(a)\\1", "back-references" },
        { "\\q", "no such escape" }, { "a*", "it finds every line" }, { "a|b?", "it finds every line" },
        { "(a{255}){255}", "it is too large" }, { "(((a{9}){9}){9}){9}", "it is too large" },
        { "a\xff", "it is not UTF-8" }, { "[\xff]", "it is not UTF-8" },
    };
    for (size_t i = 0; i < PB_COUNT(rows); i++) {
        const char *why;
        free(made(rows[i][0], &why));
        check(why && strncmp(why, rows[i][1], strlen(rows[i][1])) == 0, rows[i][0], rows[i][1], why ? why : "is taken");
    }
    for (int deep = PATTERN_DEPTH; deep <= PATTERN_DEPTH + 1; deep++) {
        char nested[2 * PATTERN_DEPTH + 8] = "";
        const char *why;
        memset(nested, '(', (size_t)deep);
        nested[deep] = 'a';
        memset(nested + deep + 1, ')', (size_t)deep);
        free(made(nested, &why));
        check(!why == (deep == PATTERN_DEPTH), nested, "groups", why ? why : "is taken");
    }
}

/* The square of these lengths is hours; more states than are kept. */
static void long_lines(void)
{
    static const char *const patterns[] = {
        "a.*b.*c.*d", "(a|aa)+$x", "(a*)*c", "(.*)(.*)(.*)x", "a.{12}Q", "(a|b)*a(a|b){20}c"
    };
    size_t n = 1 << 20;
    char *text = malloc(n);
    if (!text)
        exit(2);
    for (int kind = 0; kind < 2; kind++)
        for (size_t i = 0, random = 1; i < n; i++, random = random * 6364136223846793005 + 1)
            text[i] = kind ? "ab"[random >> 40 & 1] : 'a';
    for (size_t i = 0; i < PB_COUNT(patterns); i++)
        finds(patterns[i], (struct bytes){ (uint8_t *)text, n }, BYTES("-"));
    free(text);
}

static uint64_t seed = 1;

static unsigned below(unsigned n)
{
    seed = seed * 6364136223846793005 + 1442695040888963407;
    return (unsigned)(seed >> 33) % n;
}

/* More states than are kept, in many lines by the same pattern. */
static void many_states(void)
{
    const char *why, *pattern = "a[ab]{8}c";
    struct pattern *p = made(pattern, &why);
    for (int i = 0; i < 200; i++) {
        char text[2001];
        struct bytes line;
        for (unsigned k = 0; k < 1999; k++)
            text[k] = "ab"[below(2)];
        text[1999] = 'c';
        text[2000] = 0;
        check(pattern_find(p, bytes_of(text), &line) == (text[1999 - 9] == 'a'), pattern, text, "wrong");
    }
    check(p->state_count == PATTERN_STATES, pattern, "", "too few states for this test");
    free(p);
}

static void random_pattern(struct buf *b, unsigned depth)
{
    static const char *const atoms[] = { "a", "b", "c", ".", "[ab]", "[^a]", "[a-c]", "\\." };
    static const char *const repeats[] = { "*", "+", "?", "{2}", "{1,2}", "{0,1}", "{2,}", "{0}" };
    for (unsigned branches = 1 + below(3) / 2; branches; branches--) {
        for (unsigned pieces = 1 + below(3); pieces; pieces--) {
            if (depth == 3 && below(8) == 0) {   /* not in groups: those that repeat confuse regexec */
                buf_puts(b, below(2) ? "^" : "$");
                continue;
            }
            if (depth && below(4) == 0) {
                buf_putc(b, '(');
                random_pattern(b, depth - 1);
                buf_putc(b, ')');
            } else {
                buf_puts(b, atoms[below(PB_COUNT(atoms))]);
            }
            if (below(3) == 0)
                buf_puts(b, repeats[below(PB_COUNT(repeats))]);
        }
        if (branches > 1)
            buf_putc(b, '|');
    }
}

static void random_patterns(void)
{
    unsigned refused_too = 0;
    for (int i = 0; i < 3000; i++) {
        struct buf b = { 0 };
        regex_t re;
        const char *why;
        random_pattern(&b, 3);
        buf_putc(&b, 0);
        char *pattern = (char *)b.p;
        struct pattern *p = made(pattern, &why);
        if (regcomp(&re, pattern, REG_EXTENDED | REG_NEWLINE | REG_NOSUB) != 0)
            check(false, pattern, "", "regcomp does not take it");
        for (int k = 0; k < 20; k++) {
            char text[13] = "";
            for (unsigned n = below(12), at = 0; at < n; at++)
                text[at] = "aabbccab.\n"[below(10 - (at + 1 == n))];
            struct bytes line;
            bool found = regexec(&re, text, 0, NULL, 0) == 0;
            if (!why)
                check(pattern_find(p, bytes_of(text), &line) == found, pattern, text, found ? "not found" : "found");
            else
                check(found, pattern, text, why);   /* the only reason here is that it finds every line */
        }
        refused_too += why != NULL;
        regfree(&re);
        free(p);
        buf_free(&b);
    }
    check(refused_too < 1000, "random", "", "most are refused");
}

int main(void)
{
    table();
    refused();
    long_lines();
    many_states();
    random_patterns();
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
