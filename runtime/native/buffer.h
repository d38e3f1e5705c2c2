/* Text that grows, and tokens that do. */
#ifndef LLAMA_ONNX_BUFFER_H
#define LLAMA_ONNX_BUFFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct buffer {
    char *text;
    size_t size, room;
    bool full; /* there was no memory for more */
} buffer;

static void put_bytes(buffer *to, const char *text, size_t size) {
    if (to->size + size + 1 > to->room) {
        size_t room = (to->size + size + 1) * 2;
        char *grown = to->full ? NULL : realloc(to->text, room);
        to->full = grown == NULL;
        if (to->full) return;
        to->text = grown;
        to->room = room;
    }
    memcpy(to->text + to->size, text, size);
    to->size += size;
    to->text[to->size] = 0;
}

static void put(buffer *to, const char *text) { put_bytes(to, text, strlen(text)); }

typedef struct ids {
    int32_t *all;
    size_t count, room;
    bool full; /* there was no memory for more */
} ids;

static void ids_add(ids *to, int32_t id) {
    if (to->count == to->room) {
        size_t room = to->room * 2 + 64;
        int32_t *grown = to->full ? NULL : realloc(to->all, room * sizeof *grown);
        to->full = grown == NULL;
        if (to->full) return;
        to->all = grown;
        to->room = room;
    }
    to->all[to->count++] = id;
}

#endif
