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

/* Returns `all`, which has `count` items of `size` bytes, with `room` for one more; NULL, and `full`
   for good, if there is no memory. */
static void *room_for_one(void *all, size_t count, size_t size, size_t *room, bool *full) {
    if (count < *room) return all;
    size_t more = *room * 2 + 64;
    void *grown = *full ? NULL : realloc(all, more * size);
    *full = grown == NULL;
    if (grown) *room = more;
    return grown;
}

static void ids_add(ids *to, int32_t id) {
    int32_t *all = room_for_one(to->all, to->count, sizeof *all, &to->room, &to->full);
    if (!all) return;
    to->all = all;
    all[to->count++] = id;
}

#endif
