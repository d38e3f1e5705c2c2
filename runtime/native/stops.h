/* Finds stop texts in an answer that comes in pieces. */
#ifndef LLAMA_ONNX_STOPS_H
#define LLAMA_ONNX_STOPS_H

#include "buffer.h"

enum { MOST_STOPS = 256, LONGEST_STOP = 4096 };

/* Text that may be the start of a stop text is held back until that is known. The first stop text is
 * the one that ends first, so the result does not depend on how the text was split. */
typedef struct stop_filter {
    const char *const *stops;
    size_t count, longest;
    buffer held, shown;
    bool found;
} stop_filter;

static void stops_init(stop_filter *self, const char *const *stops, size_t count) {
    *self = (stop_filter){.stops = stops, .count = count};
    for (size_t i = 0; i < count; i++) {
        size_t length = strlen(stops[i]);
        if (length > self->longest) self->longest = length;
    }
}

static void stops_free(stop_filter *self) {
    free(self->held.text);
    free(self->shown.text);
}

/* Moves the first `size` bytes of what is held to `shown`. */
static size_t stops_show(stop_filter *self, size_t size) {
    self->shown.size = 0;
    put_bytes(&self->shown, self->held.size ? self->held.text : "", size);
    if (size) memmove(self->held.text, self->held.text + size, self->held.size - size + 1);
    self->held.size -= size;
    return self->shown.full ? 0 : size;
}

/* The length of the longest end of the text that may start a stop text. */
static size_t stops_partial(const stop_filter *self) {
    size_t most = self->longest ? self->longest - 1 : 0;
    for (size_t size = most < self->held.size ? most : self->held.size; size; size--) {
        const char *end = self->held.text + self->held.size - size;
        for (size_t i = 0; i < self->count; i++) {
            if (strncmp(self->stops[i], end, size) == 0) return size;
        }
    }
    return 0;
}

/* Adds a piece; returns how many bytes are in `shown` now, to be handed out. */
static size_t stops_feed(stop_filter *self, const char *piece) {
    const char *first = NULL, *first_end = NULL;
    put(&self->held, piece);
    self->shown.full = self->shown.full || self->held.full;
    if (self->shown.full) return 0;
    for (size_t i = 0; i < self->count; i++) {
        const char *found = strstr(self->held.text, self->stops[i]);
        const char *end = found ? found + strlen(self->stops[i]) : NULL;
        if (found && (!first || end < first_end || (end == first_end && found < first))) {
            first = found;
            first_end = end;
        }
    }
    self->found = first != NULL;
    size_t size = first ? (size_t)(first - self->held.text)
                        : self->held.size - stops_partial(self);
    return stops_show(self, size);
}

/* The answer has ended without a stop text: what is held is a part of it. */
static size_t stops_rest(stop_filter *self) { return stops_show(self, self->held.size); }

#endif
