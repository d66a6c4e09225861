/* What the kernel alone costs: a loop that accepts, reads one request, answers with the bytes of the file `answer`,
 * reads to the end and closes.  No server over TCP does with less.  The last word is where its address goes. */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static unsigned char in[65536], answer[65536];

/* Whether a HEADERS frame is whole, behind the 24 bytes of the preface. */
static int asked(size_t n)
{
    for (size_t at = 24; at + 9 <= n;) {
        size_t end = at + 9 + ((size_t)in[at] << 16 | (size_t)in[at + 1] << 8 | in[at + 2]);
        if (in[at + 3] == 1)
            return end <= n;
        at = end;
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof a;
    int on = 1, l = socket(AF_INET, SOCK_STREAM, 0);
    FILE *f = fopen("answer", "r");
    size_t size = f ? fread(answer, 1, sizeof answer, f) : 0;
    setsockopt(l, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (!size || bind(l, (struct sockaddr *)&a, sizeof a) || listen(l, 512) || getsockname(l, (struct sockaddr *)&a, &len) ||
        !(f = fopen(argv[argc - 1], "w")))
        return 1;
    fprintf(f, "127.0.0.1:%d\n", ntohs(a.sin_port));
    fclose(f);
    for (;;) {
        int c = accept(l, NULL, NULL);
        ssize_t n = 0;
        for (size_t got = 0; (n = read(c, in + got, sizeof in - got)) > 0;)
            if (asked(got += (size_t)n)) {
                n = write(c, answer, size);
                break;
            }
        while (n > 0 && (n = read(c, in, sizeof in)) > 0)
            ;
        close(c);
    }
}
