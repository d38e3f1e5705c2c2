/* tokenizer.json: the tokens and merges of a BPE vocabulary, and how texts are prepared for them.
 *
 * The file may come from a stranger. Its size, its numbers of tokens and merges, and the length of
 * a token are bounded, so that memory is; what this file does not know makes the vocabulary one
 * that `vocabulary_read` does not support.
 */
#ifndef LLAMA_ONNX_VOCABULARY_H
#define LLAMA_ONNX_VOCABULARY_H

#include "buffer.h"
#include "json.h"
#include "splits.h"

#include <time.h>

enum {
    VOCABULARY_BYTES = 64 << 20,
    MOST_TOKENS = 500000,
    MOST_MERGES = 1000000,
    MOST_ADDED = 20000,
    MOST_ID = 1 << 24,
    LONGEST_TOKEN = 10000, /* bytes */
    LONGEST_ADDED = 256,
    MOST_STEPS = 8,
    MOST_AROUND = 16 /* tokens before a text, and after it */
};

#define SPACE_MARK "\xe2\x96\x81" /* U+2581 */

/* ---- maps from 64 bits to two integers -------------------------------------------------------- */

typedef struct pair {
    uint64_t key; /* plus one; 0 is a free place */
    int32_t first, second;
} pair;

typedef struct pairs {
    pair *all;
    size_t count, room; /* `room` is a power of two */
    uint64_t seed;      /* so that nobody can choose keys that fall together */
} pairs;

static uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static pair *pairs_place(const pairs *self, uint64_t key) {
    size_t at = (size_t)mixed((key + 1) ^ self->seed) & (self->room - 1);
    while (self->all[at].key && self->all[at].key != key + 1) at = (at + 1) & (self->room - 1);
    return &self->all[at];
}

static const pair *pairs_get(const pairs *self, uint64_t key) {
    const pair *found = self->room ? pairs_place(self, key) : NULL;
    return found && found->key ? found : NULL;
}

/* Returns false if there is no memory. */
static bool pairs_put(pairs *self, uint64_t key, int32_t first, int32_t second) {
    if (self->count * 2 >= self->room) {
        pairs grown = {.room = self->room ? self->room * 2 : 1024, .seed = self->seed};
        grown.all = calloc(grown.room, sizeof *grown.all);
        if (!grown.all) return false;
        for (size_t i = 0; i < self->room; i++) {
            if (self->all[i].key) *pairs_place(&grown, self->all[i].key - 1) = self->all[i];
        }
        grown.count = self->count;
        free(self->all);
        *self = grown;
    }
    pair *place = pairs_place(self, key);
    self->count += !place->key;
    *place = (pair){key + 1, first, second};
    return true;
}

/* ---- the vocabulary --------------------------------------------------------------------------- */

typedef struct piece {
    const char *text;
    size_t length;
} piece;

typedef struct added_token {
    piece text; /* as it is decoded: prepared, if it is found in prepared texts */
    char *own;  /* that text, if it is not one of the file */
    int32_t id;
    bool special, left, right; /* `left` and `right`: it takes the spaces there */
} added_token;

/* The texts of added tokens, letter by letter: (node, byte) -> node, number of the token or -1. */
typedef struct trie {
    pairs nodes;
    int32_t count;
} trie;

typedef enum { STEP_SPLIT, STEP_SPACES, STEP_BYTES } step_kind;
typedef enum { PREFIX_NEVER, PREFIX_FIRST, PREFIX_ALWAYS } prefix_kind;

typedef struct step {
    step_kind kind;
    split_kind split;
    prefix_kind prefix; /* of STEP_SPACES: whether a mark goes before a text */
    bool words;         /* of STEP_SPACES: whether each mark starts a word */
} step;

typedef struct replacement {
    piece from, to; /* without `from`, `to` goes before a text */
} replacement;

typedef struct vocabulary {
    json file; /* owns the texts */
    piece *tokens;
    int32_t *token_ids;
    size_t token_count, token_room;
    piece *merge_texts; /* two for each merge, until they are looked up */
    size_t merge_count, merge_room;
    pairs by_text; /* hash of a text -> number of the token, next one with that hash or -1 */
    int32_t *same_hash;
    pairs by_id;  /* id -> number of the token; or -1 and the number of the added token */
    pairs merges; /* left << 32 | right -> rank, id */
    added_token added[MOST_ADDED + 1];
    size_t added_count;
    int32_t next_id; /* of an added token that is not in the vocabulary */
    trie plain, prepared; /* added tokens that are found before a text is prepared, and after it */
    replacement replacements[MOST_STEPS];
    step steps[MOST_STEPS];
    size_t replacement_count, step_count;
    int32_t before[MOST_AROUND], after[MOST_AROUND];
    size_t before_count, after_count;
    int32_t unknown;          /* -1 if there is none */
    int32_t byte_ids[256];    /* of "<0x00>" and so on, -1 where there is none */
    uint16_t byte_letters[256]; /* of STEP_BYTES */
    int16_t letter_bytes[512];  /* -1 for no letter of a byte */
    bool fuse_unknown, byte_fallback, ignore_merges;
    bool decodes_bytes; /* tokens are texts of byte letters; otherwise of spaces as marks */
    bool strips;        /* decoding removes the space before a text */
    char *why;
} vocabulary;

static bool unsupported(vocabulary *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (!*self->why) vsnprintf(self->why, WHY, format, arguments);
    va_end(arguments);
    return false;
}

static bool too_large(vocabulary *self) { return unsupported(self, "does not fit into memory"); }

static uint64_t hash_of(const vocabulary *self, const char *text, size_t length) {
    uint64_t hash = self->by_text.seed ^ 0xcbf29ce484222325u;
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3u;
    return mixed(hash) >> 1;
}

/* The id of the token with this text, -1 if there is none. */
static int32_t token_id(const vocabulary *self, const char *text, size_t length) {
    const pair *found = pairs_get(&self->by_text, hash_of(self, text, length));
    for (int32_t i = found ? found->first : -1; i >= 0; i = self->same_hash[i]) {
        const piece *one = &self->tokens[i];
        if (one->length == length && memcmp(one->text, text, length) == 0) return self->token_ids[i];
    }
    return -1;
}

static bool grow_tokens(vocabulary *self) {
    if (self->token_count < self->token_room) return true;
    size_t room = self->token_room * 2 + 1024;
    piece *tokens = realloc(self->tokens, room * sizeof *tokens);
    if (tokens) self->tokens = tokens;
    int32_t *token_ids = realloc(self->token_ids, room * sizeof *token_ids);
    if (token_ids) self->token_ids = token_ids;
    int32_t *same = realloc(self->same_hash, room * sizeof *same);
    if (same) self->same_hash = same;
    if (!tokens || !token_ids || !same) return false;
    self->token_room = room;
    return true;
}

static bool add_token(vocabulary *self, const char *text, size_t length, int32_t id) {
    if (length > LONGEST_TOKEN) return unsupported(self, "has a token of %zu bytes", length);
    if (self->token_count == MOST_TOKENS) return unsupported(self, "has too many tokens");
    if (!grow_tokens(self)) return too_large(self);
    if (token_id(self, text, length) >= 0) return unsupported(self, "has a token twice");
    uint64_t hash = hash_of(self, text, length);
    const pair *found = pairs_get(&self->by_text, hash);
    int32_t number = (int32_t)self->token_count++;
    self->tokens[number] = (piece){text, length};
    self->token_ids[number] = id;
    self->same_hash[number] = found ? found->first : -1;
    if (!pairs_put(&self->by_text, hash, number, 0) || !pairs_put(&self->by_id, (uint64_t)id, number, -1)) {
        return too_large(self);
    }
    return true;
}

static bool read_tokens(json *file, vocabulary *self) {
    json_take(file, '{');
    if (json_take(file, '}')) return true;
    do {
        const char *text;
        size_t length;
        json_node number = {JSON_NUMBER, NULL, NULL, 0, false, 0, 0, 0};
        int64_t id;
        if (json_peek(file) != '"') return json_wrong(file, "is not valid JSON (a token)");
        if (!json_string(file, &text, &length)) return false;
        if (!json_take(file, ':')) return json_wrong(file, "is not valid JSON (a colon is missing)");
        json_peek(file);
        if (file->at == file->end || !json_number(file, &number)) {
            return json_wrong(file, "has a token whose id is not a number");
        }
        if (!json_integer(&number, 0, MOST_ID, &id)) {
            return json_wrong(file, "has a token whose id is not a number that fits");
        }
        if (!add_token(self, text, length, (int32_t)id)) return json_wrong(file, "%s", self->why);
    } while (json_take(file, ','));
    return json_take(file, '}') || json_wrong(file, "is not valid JSON (the end of the tokens)");
}

static bool merge_wrong(json *file) {
    return json_wrong(file, "has a merge that is not of two tokens");
}

/* "a b" or ["a", "b"] */
static bool read_merge(json *file, piece out[2]) {
    bool list = json_take(file, '[');
    if (json_peek(file) != '"') return merge_wrong(file);
    if (!json_string(file, &out[0].text, &out[0].length)) return false;
    if (!list) {
        const char *space = memchr(out[0].text, ' ', out[0].length);
        const char *end = out[0].text + out[0].length;
        if (!space || memchr(space + 1, ' ', (size_t)(end - space - 1))) return merge_wrong(file);
        out[1] = (piece){space + 1, (size_t)(end - space - 1)};
        out[0].length = (size_t)(space - out[0].text);
        return true;
    }
    if (!json_take(file, ',') || json_peek(file) != '"') return merge_wrong(file);
    if (!json_string(file, &out[1].text, &out[1].length)) return false;
    return json_take(file, ']') || merge_wrong(file);
}

static bool read_merges(json *file, vocabulary *self) {
    json_take(file, '[');
    if (json_take(file, ']')) return true;
    do {
        if (self->merge_count == MOST_MERGES) return json_wrong(file, "has too many merges");
        if (self->merge_count == self->merge_room) {
            size_t room = self->merge_room * 2 + 1024;
            piece *grown = realloc(self->merge_texts, 2 * room * sizeof *grown);
            if (!grown) return json_wrong(file, "does not fit into memory");
            self->merge_texts = grown;
            self->merge_room = room;
        }
        if (!read_merge(file, &self->merge_texts[2 * self->merge_count])) return false;
        self->merge_count++;
    } while (json_take(file, ','));
    return json_take(file, ']') || json_wrong(file, "is not valid JSON (the end of the merges)");
}

/* Reads the two large parts of the file straight into the vocabulary. */
static bool read_large(json *file, const char *parent, const char *key, bool *taken) {
    vocabulary *self = file->user;
    bool tokens = strcmp(key, "vocab") == 0, merges = strcmp(key, "merges") == 0;
    *taken = parent && strcmp(parent, "model") == 0 &&
             ((tokens && json_peek(file) == '{') || (merges && json_peek(file) == '['));
    if (*taken && (tokens ? self->token_count : self->merge_count)) {
        return json_wrong(file, "has two models");
    }
    return !*taken || (tokens ? read_tokens(file, self) : read_merges(file, self));
}

static bool look_up_merges(vocabulary *self) {
    char *joined = malloc(2 * LONGEST_TOKEN);
    bool sound = joined != NULL;
    if (!joined) too_large(self);
    for (size_t i = 0; i < self->merge_count && sound; i++) {
        const piece *a = &self->merge_texts[2 * i], *b = a + 1;
        sound = a->length <= LONGEST_TOKEN && b->length <= LONGEST_TOKEN;
        int32_t left = sound ? token_id(self, a->text, a->length) : -1;
        int32_t right = sound ? token_id(self, b->text, b->length) : -1;
        if (sound) {
            memcpy(joined, a->text, a->length);
            memcpy(joined + a->length, b->text, b->length);
        }
        int32_t whole = sound ? token_id(self, joined, a->length + b->length) : -1;
        sound = left >= 0 && right >= 0 && whole >= 0;
        if (!sound) {
            unsupported(self, "has a merge of tokens that are not in its vocabulary");
        } else if (!pairs_put(&self->merges, (uint64_t)left << 32 | (uint32_t)right, (int32_t)i,
                              whole)) {
            sound = too_large(self);
        }
    }
    free(joined);
    free(self->merge_texts);
    self->merge_texts = NULL;
    return sound;
}

/* ---- the other parts of the file -------------------------------------------------------------- */

static bool is_true(const json *file, const json_node *parent, const char *key) {
    const json_node *found = json_get(file, parent, key);
    return found && found->kind == JSON_TRUTH && found->truth;
}

static bool is_set(const json_node *node) {
    return node && node->kind != JSON_NULL && !(node->kind == JSON_TEXT && !node->length);
}

static const char *type_of(const json *file, const json_node *node) {
    const json_node *type = node && node->kind == JSON_OBJECT ? json_get(file, node, "type") : NULL;
    return type && type->kind == JSON_TEXT ? type->text : "";
}

static bool is_type(const json *file, const json_node *node, const char *type) {
    return strcmp(type_of(file, node), type) == 0;
}

static bool read_model(vocabulary *self) {
    const json *file = &self->file;
    const json_node *model = json_get(file, file->nodes, "model");
    if (!model || model->kind != JSON_OBJECT) return unsupported(self, "has no model");
    const json_node *type = json_get(file, model, "type");
    if (type && !json_is_text(type, "BPE")) return unsupported(self, "is not of the kind BPE");
    if (!self->token_count) return unsupported(self, "has no vocabulary");
    static const char *const others[] = {"dropout", "continuing_subword_prefix",
                                         "end_of_word_suffix"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (is_set(json_get(file, model, others[i]))) {
            return unsupported(self, "sets %s", others[i]);
        }
    }
    const json_node *unknown = json_get(file, model, "unk_token");
    bool named = is_set(unknown) && unknown->kind == JSON_TEXT;
    self->unknown = named ? token_id(self, unknown->text, unknown->length) : -1;
    if (named && self->unknown < 0) return unsupported(self, "has an unk_token that is no token");
    self->fuse_unknown = is_true(file, model, "fuse_unk");
    self->byte_fallback = is_true(file, model, "byte_fallback");
    self->ignore_merges = is_true(file, model, "ignore_merges");
    for (int i = 0; i < 256; i++) {
        char text[8];
        snprintf(text, sizeof text, "<0x%02X>", (unsigned)i);
        self->byte_ids[i] = token_id(self, text, 6);
    }
    return look_up_merges(self);
}

/* Reads each part of a sequence. */
static bool read_each(vocabulary *self, const json_node *list, int depth,
                      bool (*read)(vocabulary *, const json_node *, int)) {
    const json *file = &self->file;
    for (const json_node *i = list ? json_first(file, list) : NULL; i; i = json_next(file, i)) {
        if (!read(self, i, depth + 1)) return false;
    }
    return list && list->kind == JSON_LIST;
}

/* Adds what one normalizer does, or a list of them. */
static bool read_normalizer(vocabulary *self, const json_node *node, int depth) {
    const json *file = &self->file;
    if (!is_set(node)) return true;
    if (is_type(file, node, "Sequence") && depth < 4) {
        return read_each(self, json_get(file, node, "normalizers"), depth, read_normalizer);
    }
    bool replaces = is_type(file, node, "Replace");
    const json_node *to = json_get(file, node, replaces ? "content" : "prepend");
    const json_node *pattern = replaces ? json_get(file, node, "pattern") : NULL;
    const json_node *from = pattern && pattern->kind == JSON_OBJECT
                                ? json_get(file, pattern, "String") : NULL;
    bool known = (replaces && from && from->kind == JSON_TEXT && from->length) ||
                 is_type(file, node, "Prepend");
    if (!known || !to || to->kind != JSON_TEXT || to->length > 4 || self->replacement_count == 2) {
        return unsupported(self, "has the normalizer %.40s", type_of(file, node));
    }
    self->replacements[self->replacement_count++] = (replacement){
        {from ? from->text : NULL, from ? from->length : 0}, {to->text, to->length}};
    return true;
}

static bool add_step(vocabulary *self, step one) {
    bool last = self->step_count && self->steps[self->step_count - 1].kind == STEP_BYTES;
    if (self->step_count == MOST_STEPS || last) return unsupported(self, "has too many steps");
    self->steps[self->step_count++] = one;
    return true;
}

static bool read_split(vocabulary *self, const json_node *node) {
    const json *file = &self->file;
    const json_node *pattern = json_get(file, node, "pattern");
    const json_node *text = pattern && pattern->kind == JSON_OBJECT
                                ? json_get(file, pattern, "Regex") : NULL;
    bool inverted = is_true(file, node, "invert");
    bool isolated = json_is_text(json_get(file, node, "behavior"), "Isolated");
    bool removed = json_is_text(json_get(file, node, "behavior"), "Removed");
    for (size_t i = 0; i < sizeof split_patterns / sizeof *split_patterns; i++) {
        const struct split_pattern *known = &split_patterns[i];
        if (!text || !json_is_text(text, known->text)) continue;
        /* "Removed" and inverted: what no match covers goes away, which is nothing. */
        if ((isolated && !inverted) || (removed && inverted && known->kind != SPLIT_NUMBER)) {
            return add_step(self, (step){.kind = STEP_SPLIT, .split = known->kind});
        }
    }
    return unsupported(self, "splits texts in a way of its own");
}

static bool read_spaces(vocabulary *self, const json_node *node) {
    const json *file = &self->file;
    const json_node *scheme = json_get(file, node, "prepend_scheme");
    const json_node *adds = json_get(file, node, "add_prefix_space");
    const json_node *split = json_get(file, node, "split");
    step one = {.kind = STEP_SPACES, .prefix = PREFIX_ALWAYS,
                .words = !split || is_true(file, node, "split")};
    if (!json_is_text(json_get(file, node, "replacement"), SPACE_MARK)) {
        return unsupported(self, "replaces spaces by another character");
    }
    if (scheme) {
        if (json_is_text(scheme, "never")) one.prefix = PREFIX_NEVER;
        if (json_is_text(scheme, "first")) one.prefix = PREFIX_FIRST;
    } else if (adds && adds->kind == JSON_TRUTH && !adds->truth) {
        one.prefix = PREFIX_NEVER;
    }
    return add_step(self, one);
}

static bool read_bytes(vocabulary *self, const json_node *node) {
    const json *file = &self->file;
    const json_node *pattern = json_get(file, node, "use_regex");
    if (is_true(file, node, "add_prefix_space")) {
        return unsupported(self, "adds a space before each text");
    }
    bool splits = !pattern || is_true(file, node, "use_regex");
    if (splits && !add_step(self, (step){.kind = STEP_SPLIT, .split = SPLIT_GPT2})) return false;
    return add_step(self, (step){.kind = STEP_BYTES});
}

static bool read_pre_tokenizer(vocabulary *self, const json_node *node, int depth) {
    const json *file = &self->file;
    if (!is_set(node)) return true;
    if (is_type(file, node, "Sequence") && depth < 4) {
        return read_each(self, json_get(file, node, "pretokenizers"), depth, read_pre_tokenizer);
    }
    if (is_type(file, node, "Split")) return read_split(self, node);
    if (is_type(file, node, "ByteLevel")) return read_bytes(self, node);
    if (is_type(file, node, "Metaspace")) return read_spaces(self, node);
    return unsupported(self, "has the pre-tokenizer %.40s", type_of(file, node));
}

/* The ids of a special token in a template; false if they do not fit. */
static bool read_around(vocabulary *self, const json_node *post, const json_node *entry,
                        int32_t *to, size_t *count) {
    const json *file = &self->file;
    const json_node *name = json_get(file, entry, "id");
    const json_node *all = json_get(file, post, "special_tokens");
    const json_node *token = name && all && name->kind == JSON_TEXT && all->kind == JSON_OBJECT
                                 ? json_get(file, all, name->text) : NULL;
    const json_node *list = token && token->kind == JSON_OBJECT ? json_get(file, token, "ids") : NULL;
    if (!list || list->kind != JSON_LIST) return unsupported(self, "has a damaged template");
    for (const json_node *i = json_first(file, list); i; i = json_next(file, i)) {
        int64_t id;
        if (*count == MOST_AROUND || !json_integer(i, 0, MOST_ID, &id)) {
            return unsupported(self, "has a template of too many tokens");
        }
        to[(*count)++] = (int32_t)id;
    }
    return true;
}

static bool read_template_of_ids(vocabulary *self, const json_node *post) {
    const json *file = &self->file;
    const json_node *list = json_get(file, post, "single");
    bool text = false;
    if (!list || list->kind != JSON_LIST || self->before_count || self->after_count) {
        return unsupported(self, "has a damaged template");
    }
    for (const json_node *i = json_first(file, list); i; i = json_next(file, i)) {
        const json_node *special = i->kind == JSON_OBJECT ? json_get(file, i, "SpecialToken") : NULL;
        if (special && special->kind == JSON_OBJECT) {
            if (!read_around(self, post, special, text ? self->after : self->before,
                             text ? &self->after_count : &self->before_count)) return false;
        } else if (text || i->kind != JSON_OBJECT || !json_get(file, i, "Sequence")) {
            return unsupported(self, "has a damaged template");
        } else {
            text = true;
        }
    }
    return text || unsupported(self, "has a damaged template");
}

static bool read_post_processor(vocabulary *self, const json_node *node, int depth) {
    const json *file = &self->file;
    if (!is_set(node) || is_type(file, node, "ByteLevel")) return true;
    if (is_type(file, node, "Sequence") && depth < 4) {
        return read_each(self, json_get(file, node, "processors"), depth, read_post_processor);
    }
    if (is_type(file, node, "TemplateProcessing")) return read_template_of_ids(self, node);
    return unsupported(self, "has the post-processor %.40s", type_of(file, node));
}

/* A "Replace" of marks by spaces, and "Strip" of one space before a text, in any list. */
static bool read_decoder(vocabulary *self, const json_node *node, int depth) {
    const json *file = &self->file;
    const json_node *pattern, *from;
    int64_t start, stop;
    if (is_type(file, node, "ByteLevel") && !depth) {
        self->decodes_bytes = true;
        return true;
    }
    if (is_type(file, node, "Metaspace") && !depth) {
        const json_node *scheme = json_get(file, node, "prepend_scheme");
        const json_node *adds = json_get(file, node, "add_prefix_space");
        self->strips = scheme ? !json_is_text(scheme, "never")
                              : !adds || is_true(file, node, "add_prefix_space");
        return json_is_text(json_get(file, node, "replacement"), SPACE_MARK) ||
               unsupported(self, "has an unusual decoder");
    }
    if (is_type(file, node, "Sequence") && !depth) {
        return read_each(self, json_get(file, node, "decoders"), depth, read_decoder);
    }
    if (is_type(file, node, "ByteFallback") || is_type(file, node, "Fuse")) return true;
    if (is_type(file, node, "Replace")) {
        pattern = json_get(file, node, "pattern");
        from = pattern && pattern->kind == JSON_OBJECT ? json_get(file, pattern, "String") : NULL;
        if (json_is_text(from, SPACE_MARK) && json_is_text(json_get(file, node, "content"), " ")) {
            return true;
        }
    }
    if (is_type(file, node, "Strip")) {
        const json_node *a = json_get(file, node, "start"), *b = json_get(file, node, "stop");
        self->strips = a && b && json_integer(a, 1, 1, &start) && json_integer(b, 0, 0, &stop) &&
                       json_is_text(json_get(file, node, "content"), " ");
        if (self->strips) return true;
    }
    return unsupported(self, "has the decoder %.40s", node ? type_of(file, node) : "none");
}

/* GPT-2's letters of bytes: printable ones are themselves, the others follow U+0100. */
static void make_letters(vocabulary *self) {
    int next = 256;
    for (int i = 0; i < 512; i++) self->letter_bytes[i] = -1;
    for (int i = 0; i < 256; i++) {
        bool shown = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
        self->byte_letters[i] = (uint16_t)(shown ? i : next++);
        self->letter_bytes[self->byte_letters[i]] = (int16_t)i;
    }
}

/* ---- added tokens ----------------------------------------------------------------------------- */

/* Applies the normalizer. */
static void prepare(const vocabulary *self, const char *text, size_t length, buffer *out) {
    buffer other = {0};
    put_bytes(out, text, length);
    for (size_t i = 0; i < self->replacement_count; i++) {
        const replacement *one = &self->replacements[i];
        buffer swap = *out;
        *out = other;
        other = swap;
        out->size = 0;
        const char *c = other.text, *end = c + other.size;
        if (!one->from.text && other.size) put_bytes(out, one->to.text, one->to.length);
        for (const char *found; one->from.text && c < end; c = found + one->from.length) {
            size_t left = (size_t)(end - c);
            for (found = c; (found = memchr(found, one->from.text[0], left)) != NULL; found++) {
                left = (size_t)(end - found);
                if (left >= one->from.length &&
                    memcmp(found, one->from.text, one->from.length) == 0) break;
                left--;
            }
            if (!found) break;
            put_bytes(out, c, (size_t)(found - c));
            put_bytes(out, one->to.text, one->to.length);
        }
        if (c < end) put_bytes(out, c, (size_t)(end - c));
        out->full = out->full || other.full;
    }
    free(other.text);
}

static bool trie_add(trie *self, const char *text, size_t length, int32_t token) {
    int32_t node = 0;
    for (size_t i = 0; i < length; i++) {
        uint64_t key = (uint64_t)node << 8 | (unsigned char)text[i];
        const pair *next = pairs_get(&self->nodes, key);
        bool last = i + 1 == length;
        int32_t number = next ? next->first : ++self->count;
        int32_t known = next ? next->second : -1;
        if ((!next || last) && !pairs_put(&self->nodes, key, number, last ? token : known)) {
            return false;
        }
        node = number;
    }
    return true;
}

/* The number of the longest token at `text`, -1 if there is none. */
static int32_t trie_find(const trie *self, const char *text, size_t length, size_t *size) {
    int32_t node = 0, found = -1;
    for (size_t i = 0; i < length; i++) {
        const pair *next = pairs_get(&self->nodes, (uint64_t)node << 8 | (unsigned char)text[i]);
        if (!next) break;
        node = next->first;
        if (next->second >= 0) {
            found = next->second;
            *size = i + 1;
        }
    }
    return found;
}

static bool read_added_token(vocabulary *self, const json_node *node) {
    const json *file = &self->file;
    bool object = node->kind == JSON_OBJECT;
    const json_node *text = object ? json_get(file, node, "content") : NULL;
    const json_node *number = object ? json_get(file, node, "id") : NULL;
    int64_t id;
    if (!text || text->kind != JSON_TEXT || !number || !json_integer(number, 0, MOST_ID, &id)) {
        return unsupported(self, "has a damaged added token");
    }
    if (text->length > LONGEST_ADDED || is_true(file, node, "single_word")) {
        return unsupported(self, "has the unusual added token %.40s", text->text);
    }
    if (!text->length) return true;
    int32_t index = (int32_t)self->added_count++;
    self->added[index] = (added_token){{text->text, text->length}, NULL, (int32_t)id,
                                       is_true(file, node, "special"),
                                       is_true(file, node, "lstrip"), is_true(file, node, "rstrip")};
    /* A text that is in the vocabulary keeps its id; others follow the vocabulary. The library
     * `tokenizers` counts so, whatever the file says. */
    int32_t expected = token_id(self, text->text, text->length);
    if (expected < 0) expected = self->next_id;
    if (expected != id) {
        return unsupported(self, "has the added token %.40s with another id than its place",
                           text->text);
    }
    if (id >= self->next_id) self->next_id = (int32_t)id + 1;
    bool sound = pairs_put(&self->by_id, (uint64_t)id, -1, index);
    if (is_true(file, node, "normalized") && self->replacement_count) {
        buffer ready = {0};
        prepare(self, text->text, text->length, &ready);
        sound = sound && !ready.full && trie_add(&self->prepared, ready.text, ready.size, index);
        self->added[index].own = ready.text;
        self->added[index].text = (piece){ready.text, ready.size};
    } else if (is_true(file, node, "normalized")) {
        sound = sound && trie_add(&self->prepared, text->text, text->length, index);
    } else {
        sound = sound && trie_add(&self->plain, text->text, text->length, index);
    }
    return sound || too_large(self);
}

static bool read_added(vocabulary *self) {
    const json *file = &self->file;
    const json_node *list = json_get(file, file->nodes, "added_tokens");
    if (!is_set(list)) return true;
    if (list->kind != JSON_LIST || list->size > MOST_ADDED) {
        return unsupported(self, "has too many added tokens");
    }
    self->next_id = (int32_t)self->token_count;
    for (const json_node *i = json_first(file, list); i; i = json_next(file, i)) {
        if (!read_added_token(self, i)) return false;
    }
    return true;
}

/* ---- the whole file --------------------------------------------------------------------------- */

static void vocabulary_free(vocabulary *self) {
    if (!self) return;
    for (size_t i = 0; i < self->added_count; i++) free(self->added[i].own);
    json_free(&self->file);
    free(self->tokens);
    free(self->token_ids);
    free(self->same_hash);
    free(self->merge_texts);
    free(self->by_text.all);
    free(self->by_id.all);
    free(self->merges.all);
    free(self->plain.nodes.all);
    free(self->prepared.nodes.all);
    free(self);
}

static bool read_parts(vocabulary *self) {
    const json *file = &self->file;
    const json_node *root = file->nodes;
    if (root->kind != JSON_OBJECT) return unsupported(self, "is not a JSON object");
    return read_model(self) && read_normalizer(self, json_get(file, root, "normalizer"), 0) &&
           read_pre_tokenizer(self, json_get(file, root, "pre_tokenizer"), 0) &&
           read_post_processor(self, json_get(file, root, "post_processor"), 0) &&
           read_decoder(self, json_get(file, root, "decoder"), 0) && read_added(self);
}

/* Reads a tokenizer.json; NULL if it is damaged or of a kind that is not known here. `why` then says
 * what it has, to follow the file's name. */
static vocabulary *vocabulary_read(const char *text, size_t length, char why[WHY]) {
    vocabulary *self = calloc(1, sizeof *self);
    why[0] = 0;
    if (!self || length > VOCABULARY_BYTES) {
        explain(why, self ? "is too large" : "does not fit into memory");
        free(self);
        return NULL;
    }
    uint64_t seed = mixed((uint64_t)(uintptr_t)self ^ (uint64_t)time(NULL) << 20 ^ (uint64_t)clock());
    self->by_text.seed = self->by_id.seed = self->merges.seed = seed;
    self->plain.nodes.seed = self->prepared.nodes.seed = seed;
    self->why = why;
    make_letters(self);
    bool sound = json_parse_with(&self->file, text, length, read_large, self);
    if (!sound && !*why) explain(why, "%.480s", self->file.why);
    sound = sound && read_parts(self);
    if (!sound && !*why) explain(why, "has a part of an unknown kind");
    if (sound) return self;
    vocabulary_free(self);
    return NULL;
}

#endif
