/* Reads graphs from standard input, each after its length and the size of its data, both of 8 bytes,
 * and prints "1" for each that the C library accepts, "0" for others. */
#define _GNU_SOURCE
#include "graph.h"

int main(void) {
    uint64_t sizes[2];
    while (fread(sizes, sizeof sizes, 1, stdin) == 1) {
        char why[WHY] = "", *bytes = malloc(sizes[0]); /* no byte more: the sanitizer watches it */
        config found;
        if (fread(bytes, 1, sizes[0], stdin) != sizes[0]) return 1;
        bool sound = graph_read(bytes, sizes[0], sizes[1], &found, why);
        if (sound == (why[0] != 0)) return 2;
        putchar(sound ? '1' : '0');
        free(bytes);
    }
    return 0;
}
