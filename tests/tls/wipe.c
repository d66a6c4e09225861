/* The program, and at its exit a look through all of its memory for what WIPE_SECRETS lists: a file, a secret a line, as
 * `NAME HEX`.  Each that is still there is named on stderr.  Linux only: the memory is what /proc/self/maps says. */
#include "../harness.h"

static struct {
    char name[40];
    uint8_t bytes[16];               /* turned over, so that this list does not find itself */
    bool found;
} secrets[400];

static size_t secret_count;

static void look_through(const uint8_t *p, const uint8_t *end)
{
    for (; end - p >= (ptrdiff_t)sizeof secrets[0].bytes; p++)
        for (size_t i = 0; i < secret_count; i++) {
            size_t n = 0;
            while (n < sizeof secrets[i].bytes && (p[n] ^ secrets[i].bytes[n]) == 0xff)
                n++;
            if (n == sizeof secrets[i].bytes && !secrets[i].found) {
                secrets[i].found = true;
                fprintf(stderr, "wipe: %s is still in memory\n", secrets[i].name);
            }
        }
}

static void at_end(void)
{
    FILE *f = fopen(getenv("WIPE_SECRETS"), "r");
    char bytes[33], line[300];
    while (f && secret_count < PB_COUNT(secrets) && fscanf(f, "%39s %32s", secrets[secret_count].name, bytes) == 2) {
        for (size_t i = 0; i < sizeof secrets[0].bytes; i++) {
            char two[3] = { bytes[2 * i], bytes[2 * i + 1], 0 };
            secrets[secret_count].bytes[i] = (uint8_t)~strtoul(two, NULL, 16);
        }
        secret_count++;
    }
    memset(bytes, 0, sizeof bytes);
    if (f)
        fclose(f);
    f = fopen("/proc/self/maps", "r");
    size_t regions = 0;
    while (f && fgets(line, sizeof line, f)) {
        unsigned long from, to;
        char may[5];
        if (sscanf(line, "%lx-%lx %4s", &from, &to, may) == 3 && may[0] == 'r' && may[1] == 'w') {
            look_through((const uint8_t *)from, (const uint8_t *)to);
            regions++;
        }
    }
    if (f)
        fclose(f);
    fprintf(stderr, "wipe: looked for %zu secrets in %zu regions\n", secret_count, regions);
}

int main(int argc, char **argv)
{
    return atexit(at_end) ? 2 : cvms_main(argc, argv);
}
