/* Texts to tokens and back, with the vocabulary of a tokenizer.json: as the library `tokenizers`.
 *
 * Merges are found with a heap, so that a text of n characters takes time n log n, whatever it is.
 */
#ifndef LLAMA_ONNX_TOKENIZER_H
#define LLAMA_ONNX_TOKENIZER_H

#include "vocabulary.h"

#define LONGEST_TEXT ((size_t)1 << 28) /* bytes */

/* ---- merges ----------------------------------------------------------------------------------- */

/* A part of a word: `next` and `previous` are places, -1 at the ends; `id` is -1 after it was
 * merged into the one before. */
typedef struct part {
    int32_t id, previous, next;
} part;

typedef struct merge {
    int32_t rank, place, id;
} merge;

typedef struct encoding {
    const vocabulary *words;
    ids *out;
    part *parts;
    merge *heap;
    size_t part_count, part_room, heap_count, heap_room;
    buffer letters; /* of STEP_BYTES */
    bool full;      /* there was no memory for more */
} encoding;

static bool earlier(const merge *a, const merge *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->place < b->place;
}

static void heap_sink(merge *heap, size_t count, size_t at) {
    merge moved = heap[at];
    for (size_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && earlier(&heap[child + 1], &heap[child])) child++;
        if (!earlier(&heap[child], &moved)) break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* Adds the merge of the part at `place` and the next one to the heap, if there is one. */
static void offer(encoding *self, int32_t place, bool rises) {
    const part *left = &self->parts[place];
    if (place < 0 || left->next < 0) return;
    uint64_t key = (uint64_t)left->id << 32 | (uint32_t)self->parts[left->next].id;
    const pair *found = pairs_get(&self->words->merges, key);
    if (!found) return;
    merge *heap =
        room_for_one(self->heap, self->heap_count, sizeof *heap, &self->heap_room, &self->full);
    if (!heap) return;
    self->heap = heap;
    merge added = {found->first, place, found->second};
    size_t at = self->heap_count++;
    for (; rises && at && earlier(&added, &heap[(at - 1) / 2]); at = (at - 1) / 2) {
        heap[at] = heap[(at - 1) / 2];
    }
    heap[at] = added;
}

static void add_part(encoding *self, int32_t id) {
    part *parts =
        room_for_one(self->parts, self->part_count, sizeof *parts, &self->part_room, &self->full);
    if (!parts) return;
    self->parts = parts;
    int32_t place = (int32_t)self->part_count++;
    parts[place] = (part){id, place - 1, -1};
    if (place) parts[place - 1].next = place;
}

static bool add_bytes(encoding *self, const char *text, size_t size) {
    const vocabulary *words = self->words;
    for (size_t i = 0; i < size; i++) {
        if (words->byte_ids[(unsigned char)text[i]] < 0) return false;
    }
    for (size_t i = 0; i < size; i++) add_part(self, words->byte_ids[(unsigned char)text[i]]);
    return true;
}

static void add_characters(encoding *self, const char *text, size_t length) {
    const vocabulary *words = self->words;
    bool unknown = false; /* an unknown token waits, to be joined with the next */
    for (const char *c = text; c < text + length;) {
        size_t size;
        scan_code(c, &size);
        int32_t id = token_id(words, c, size);
        if (id >= 0) {
            if (unknown) add_part(self, words->unknown);
            unknown = false;
            add_part(self, id);
        } else if (!(words->byte_fallback && add_bytes(self, c, size)) && words->unknown >= 0) {
            if (unknown && !words->fuse_unknown) add_part(self, words->unknown);
            unknown = true;
        }
        c += size;
    }
    if (unknown) add_part(self, words->unknown);
}

static void apply_merges(encoding *self) {
    part *all = self->parts;
    self->heap_count = 0;
    for (size_t i = 0; i + 1 < self->part_count; i++) offer(self, (int32_t)i, false);
    for (size_t i = self->heap_count / 2; i-- > 0;) heap_sink(self->heap, self->heap_count, i);
    while (self->heap_count && !self->full) {
        merge top = self->heap[0];
        self->heap[0] = self->heap[--self->heap_count];
        if (self->heap_count) heap_sink(self->heap, self->heap_count, 0);
        part *left = &all[top.place];
        if (left->id < 0 || left->next < 0) continue;
        uint64_t key = (uint64_t)left->id << 32 | (uint32_t)all[left->next].id;
        const pair *now = pairs_get(&self->words->merges, key);
        if (!now || now->second != top.id) continue; /* one of the two has changed since */
        part *right = &all[left->next];
        left->id = top.id;
        right->id = -1;
        left->next = right->next;
        if (right->next >= 0) all[right->next].previous = top.place;
        if (left->previous >= 0) offer(self, left->previous, true);
        offer(self, top.place, true);
    }
}

static void encode_word(encoding *self, const char *text, size_t length) {
    int32_t whole = self->words->ignore_merges ? token_id(self->words, text, length) : -1;
    if (!length) return;
    if (whole >= 0) {
        ids_add(self->out, whole);
        return;
    }
    self->part_count = 0;
    add_characters(self, text, length);
    if (!self->full) apply_merges(self);
    for (int32_t i = self->part_count ? 0 : -1; i >= 0; i = self->parts[i].next) {
        ids_add(self->out, self->parts[i].id);
    }
}

/* ---- words ------------------------------------------------------------------------------------ */

static void encode_step(encoding *self, const char *text, size_t length, size_t index, bool first);

static void encode_letters(encoding *self, const char *text, size_t length) {
    char letter[4];
    self->letters.size = 0;
    for (size_t i = 0; i < length; i++) {
        char *end = utf8_write(letter, self->words->byte_letters[(unsigned char)text[i]]);
        put_bytes(&self->letters, letter, (size_t)(end - letter));
    }
    self->full = self->full || self->letters.full;
    if (!self->full) encode_word(self, self->letters.text, self->letters.size);
}

static void encode_spaces(encoding *self, const char *text, size_t length, size_t index,
                          bool first) {
    const step *one = &self->words->steps[index];
    const size_t mark = strlen(SPACE_MARK);
    buffer marked = {0};
    bool prefixed = length && (*text == ' ' ||
                               (length >= mark && memcmp(text, SPACE_MARK, mark) == 0));
    if (!prefixed && (one->prefix == PREFIX_ALWAYS || (one->prefix == PREFIX_FIRST && first))) {
        put(&marked, SPACE_MARK);
    }
    for (const char *c = text; c < text + length; c++) {
        put_bytes(&marked, *c == ' ' ? SPACE_MARK : c, *c == ' ' ? mark : 1);
    }
    self->full = self->full || marked.full;
    size_t from = 0;
    for (size_t at = 1; one->words && !self->full && at + mark <= marked.size; at++) {
        if (memcmp(marked.text + at, SPACE_MARK, mark)) continue;
        encode_step(self, marked.text + from, at - from, index + 1, first && !from);
        from = at;
    }
    if (!self->full && marked.text) {
        encode_step(self, marked.text + from, marked.size - from, index + 1, first && !from);
    }
    free(marked.text);
}

/* Applies the steps from `index` to a part of a text; `first`: it is the start of the text. */
static void encode_step(encoding *self, const char *text, size_t length, size_t index, bool first) {
    if (index == self->words->step_count) {
        encode_word(self, text, length);
        return;
    }
    const step *one = &self->words->steps[index];
    if (one->kind == STEP_BYTES) {
        encode_letters(self, text, length);
    } else if (one->kind == STEP_SPACES) {
        encode_spaces(self, text, length, index, first);
    } else {
        for (const char *c = text, *end = text + length, *stop; c < end && !self->full; c = stop) {
            stop = split_next(one->split, c, end);
            encode_step(self, c, (size_t)(stop - c), index + 1, first && c == text);
        }
    }
}

/* ---- added tokens ----------------------------------------------------------------------------- */

static const char *spaces_before(const char *c, const char *start) {
    while (c > start) {
        const char *before = c - 1;
        size_t size;
        while (before > start && (*before & 0xc0) == 0x80) before--;
        if (scan_class(before, c, &size) != UNICODE_SPACE) break;
        c = before;
    }
    return c;
}

/* Encodes the parts of a text between added tokens. `prepared`: whether it is prepared already. */
static void encode_section(encoding *self, const char *text, size_t length, bool prepared,
                           bool first);

static void encode_part(encoding *self, const char *text, size_t length, bool prepared,
                        bool first) {
    if (!length || self->full) return;
    if (prepared || (!self->words->replacement_count && !self->words->prepared.count)) {
        encode_step(self, text, length, 0, first);
    } else if (!self->words->replacement_count) {
        encode_section(self, text, length, true, first);
    } else {
        buffer ready = {0};
        prepare(self->words, text, length, &ready);
        self->full = self->full || ready.full;
        if (!self->full) encode_section(self, ready.text, ready.size, true, first);
        free(ready.text);
    }
}

static void encode_section(encoding *self, const char *text, size_t length, bool prepared,
                           bool first) {
    const trie *known = prepared ? &self->words->prepared : &self->words->plain;
    const char *from = text, *end = text + length;
    size_t size = 0;
    for (const char *at = text; known->count && at < end && !self->full;) {
        int32_t found = trie_find(known, at, (size_t)(end - at), &size);
        if (found < 0) {
            at++;
            continue;
        }
        const added_token *token = &self->words->added[found];
        const char *start = token->left ? spaces_before(at, from) : at, *stop = at + size;
        if (token->right) stop = scan_run(stop, end, SET_SPACES, SIZE_MAX);
        if (start > from) {
            encode_part(self, from, (size_t)(start - from), prepared, first && from == text);
        }
        ids_add(self->out, token->id);
        from = at = stop;
    }
    if (from < end) encode_part(self, from, (size_t)(end - from), prepared, first && from == text);
}

/* Adds the tokens of a text, which must be UTF-8, to `out`; with `around`, those that the vocabulary
 * puts before and after one too. Returns false if there is no memory for them. */
static bool tokenizer_encode(const vocabulary *self, const char *text, size_t length, bool around,
                             ids *out) {
    encoding work = {.words = self, .out = out};
    if (length > LONGEST_TEXT) return false;
    for (size_t i = 0; around && i < self->before_count; i++) ids_add(out, self->before[i]);
    encode_section(&work, text, length, false, true);
    for (size_t i = 0; around && i < self->after_count; i++) ids_add(out, self->after[i]);
    free(work.parts);
    free(work.heap);
    free(work.letters.text);
    return !work.full && !out->full;
}

/* ---- decoding --------------------------------------------------------------------------------- */

/* Turns tokens into text, one by one, and holds back what is not a whole character yet. */
typedef struct decoder {
    const vocabulary *words;
    unsigned char waiting[4]; /* the start of a character */
    size_t count;
    bool strip; /* the space before the text is still to be removed */
} decoder;

#define REPLACEMENT "\xef\xbf\xbd"

static void decoder_text(decoder *self, buffer *out, const char *text, size_t size) {
    if (!size) return;
    if (self->strip && *text == ' ') {
        text++;
        size--;
    }
    self->strip = false;
    put_bytes(out, text, size);
}

/* Gives up what waits: each of its bytes, or all of them if tokens are texts of bytes, as one. */
static void decoder_flush(decoder *self, buffer *out) {
    size_t count = self->count && self->words->decodes_bytes ? 1 : self->count;
    while (count--) decoder_text(self, out, REPLACEMENT, 3);
    self->count = 0;
}

/* Whether these bytes can begin a character of more. */
static bool is_beginning(const unsigned char *c, size_t count) {
    unsigned char second = count > 1 ? c[1] : c[0] == 0xe0 ? 0xa0 : c[0] == 0xf0 ? 0x90 : 0x80;
    size_t size = c[0] >= 0xf0 ? 4 : c[0] >= 0xe0 ? 3 : 2;
    unsigned char whole[4] = {c[0], second, count > 2 ? c[2] : 0x80, 0x80};
    return c[0] >= 0xc2 && c[0] < 0xf5 && count < size && utf8_size(whole, size) == size;
}

static void decoder_byte(decoder *self, buffer *out, unsigned char byte) {
    self->waiting[self->count++] = byte;
    if (utf8_size(self->waiting, self->count) == self->count) {
        char whole[4];
        size_t size = self->count;
        memcpy(whole, self->waiting, size);
        self->count = 0;
        decoder_text(self, out, whole, size);
    } else if (!is_beginning(self->waiting, self->count)) {
        bool first = self->count == 1;
        if (!first) self->count--;
        decoder_flush(self, out);
        if (!first) decoder_byte(self, out, byte); /* once: nothing waits now */
    }
}

/* The byte that "<0x0A>" stands for, -1 for other texts. */
static int byte_of(const piece *token) {
    static const char digits[] = "0123456789ABCDEF";
    const char *text = token->text, *high, *low;
    if (token->length != 6 || memcmp(text, "<0x", 3) || text[5] != '>') return -1;
    high = memchr(digits, text[3] >= 'a' ? text[3] - 32 : text[3], 16);
    low = memchr(digits, text[4] >= 'a' ? text[4] - 32 : text[4], 16);
    return high && low ? (int)((high - digits) << 4 | (low - digits)) : -1;
}

static bool only_letters(const vocabulary *words, const piece *token) {
    size_t size;
    for (const char *c = token->text; c < token->text + token->length; c += size) {
        uint32_t code = scan_code(c, &size);
        if (code >= 512 || words->letter_bytes[code] < 0) return false;
    }
    return true;
}

static void decoder_letters(decoder *self, buffer *out, const piece *token) {
    bool letters = only_letters(self->words, token);
    size_t size = 1;
    for (const char *c = token->text; c < token->text + token->length; c += size) {
        unsigned byte = letters ? (unsigned)self->words->letter_bytes[scan_code(c, &size)]
                                : (unsigned char)*c;
        decoder_byte(self, out, (unsigned char)byte);
    }
}

static void decoder_marks(decoder *self, buffer *out, const piece *token) {
    const size_t mark = strlen(SPACE_MARK);
    const char *from = token->text, *end = from + token->length;
    for (const char *c = from; c < end; c++) {
        if ((size_t)(end - c) < mark || memcmp(c, SPACE_MARK, mark)) continue;
        decoder_text(self, out, from, (size_t)(c - from));
        decoder_text(self, out, " ", 1);
        c += mark - 1;
        from = c + 1;
    }
    decoder_text(self, out, from, (size_t)(end - from));
}

/* The text of a token, NULL for a number that is none. `*special`: it is not shown. */
static const piece *token_text(const vocabulary *self, int32_t id, bool *special) {
    const pair *found = id < 0 ? NULL : pairs_get(&self->by_id, (uint64_t)id);
    bool added = found && found->first < 0;
    *special = added && self->added[found->second].special;
    if (!found) return NULL;
    return added ? &self->added[found->second].text : &self->tokens[found->first];
}

/* Adds the characters that the token `id` completes to `out`. */
static void decoder_put(decoder *self, int32_t id, buffer *out) {
    bool special;
    const piece *token = token_text(self->words, id, &special);
    if (!token || special) return;
    if (self->words->decodes_bytes) {
        decoder_letters(self, out, token);
        return;
    }
    int byte = byte_of(token);
    if (byte >= 0) {
        decoder_byte(self, out, (unsigned char)byte);
    } else {
        decoder_flush(self, out);
        decoder_marks(self, out, token);
    }
}

#endif
