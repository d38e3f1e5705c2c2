/* A strict reader of JSON from strangers, bounded in size, depth and number of values. */
#ifndef LLAMA_ONNX_JSON_H
#define LLAMA_ONNX_JSON_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { JSON_DEPTH = 64, JSON_DIGITS = 64, JSON_KEYS = 4096, JSON_VALUES = 200000,
       WHY = 512 };

typedef enum { JSON_NULL, JSON_TRUTH, JSON_NUMBER, JSON_TEXT, JSON_LIST, JSON_OBJECT } json_kind;

/* A value. The children of a list or an object are a chain: child, then next, until 0. */
typedef struct json_node {
    json_kind kind;
    const char *key;  /* in an object; without a NUL inside */
    const char *text; /* of a text: decoded, with a NUL at its end and none inside; of a number: as
                       * it was written, without a NUL at its end */
    size_t length;    /* of `text` */
    bool truth;
    size_t size, child, next;
} json_node;

struct json;

/* Reads the value of `key` in place of the parser, if it wants to: `*taken`. `parent` is the key of
 * the object that has it, NULL for the outermost one. Returns false for a value that is wrong. */
typedef bool (*json_reader)(struct json *self, const char *parent, const char *key, bool *taken);

typedef struct json {
    json_node *nodes; /* nodes[0] is the whole value */
    size_t count, room;
    char *copy, *at, *end;
    json_reader reader; /* NULL if the parser reads everything */
    void *user;         /* for `reader` */
    char why[WHY]; /* what is wrong, to follow the name of a file: "is not UTF-8 text" */
} json;

static void explain(char why[WHY], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, WHY, format, arguments);
    va_end(arguments);
}

static bool json_wrong(json *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(self->why, sizeof self->why, format, arguments);
    va_end(arguments);
    return false;
}

/* The length of the UTF-8 character at `text`, 0 if it is not one: overlong forms, halves of
 * surrogate pairs and numbers above 0x10ffff are not. */
static size_t utf8_size(const unsigned char *text, size_t left) {
    uint32_t code = text[0];
    size_t size = code < 0x80 ? 1 : code >= 0xf0 && code < 0xf5 ? 4 : code >= 0xe0 && code < 0xf0 ? 3
                : code >= 0xc2 && code < 0xe0 ? 2 : 0;
    if (!size || size > left) return 0;
    code &= size == 1 ? 0x7f : 0xffu >> (size + 1);
    for (size_t i = 1; i < size; i++) {
        if ((text[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (text[i] & 0x3f);
    }
    if (size == 3 && (code < 0x800 || (code >= 0xd800 && code < 0xe000))) return 0;
    if (size == 4 && (code < 0x10000 || code > 0x10ffff)) return 0;
    return size;
}

static bool is_utf8(const char *text, size_t length) {
    while (length) {
        size_t size = utf8_size((const unsigned char *)text, length);
        if (!size) return false;
        text += size;
        length -= size;
    }
    return true;
}

/* ---- the parser ------------------------------------------------------------------------------- */

static void json_space(json *self) {
    while (self->at < self->end && strchr(" \t\r\n", *self->at) && *self->at) self->at++;
}

static int json_peek(json *self) {
    json_space(self);
    return self->at < self->end ? (unsigned char)*self->at : -1;
}

static bool json_take(json *self, char expected) {
    if (json_peek(self) != expected) return false;
    self->at++;
    return true;
}

static bool json_hex(json *self, uint32_t *out) {
    *out = 0;
    if (self->end - self->at < 4) return json_wrong(self, "is not valid JSON (a broken escape)");
    for (int i = 0; i < 4; i++) {
        const char *digits = "0123456789abcdef", c = *self->at++;
        const char *found = c ? strchr(digits, c >= 'A' && c <= 'F' ? c + 32 : c) : NULL;
        if (!found) return json_wrong(self, "is not valid JSON (a broken escape)");
        *out = *out << 4 | (uint32_t)(found - digits);
    }
    return true;
}

static char *utf8_write(char *out, uint32_t code) {
    if (code < 0x80) {
        *out++ = (char)code;
    } else if (code < 0x800) {
        *out++ = (char)(0xc0 | code >> 6);
        *out++ = (char)(0x80 | (code & 0x3f));
    } else {
        if (code < 0x10000) {
            *out++ = (char)(0xe0 | code >> 12);
        } else {
            *out++ = (char)(0xf0 | code >> 18);
            *out++ = (char)(0x80 | (code >> 12 & 0x3f));
        }
        *out++ = (char)(0x80 | (code >> 6 & 0x3f));
        *out++ = (char)(0x80 | (code & 0x3f));
    }
    return out;
}

static bool json_escape(json *self, char **out) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    uint32_t code, second;
    char c = self->at < self->end ? *self->at++ : 0;
    const char *found = c ? strchr(names, c) : NULL;
    if (found) {
        *(*out)++ = values[found - names];
        return true;
    }
    if (c != 'u') return json_wrong(self, "is not valid JSON (a broken escape)");
    if (!json_hex(self, &code)) return false;
    if (!code) return json_wrong(self, "has a NUL in a text");
    if (code >= 0xd800 && code < 0xe000) {
        if (code >= 0xdc00 || self->end - self->at < 2 || self->at[0] != '\\' || self->at[1] != 'u') {
            return json_wrong(self, "has half of a surrogate pair in a text");
        }
        self->at += 2;
        if (!json_hex(self, &second)) return false;
        if (second < 0xdc00 || second >= 0xe000) {
            return json_wrong(self, "has half of a surrogate pair in a text");
        }
        code = 0x10000 + ((code - 0xd800) << 10 | (second - 0xdc00));
    }
    *out = utf8_write(*out, code);
    return true;
}

/* Decodes the text that starts at `at` into its own place: decoding never makes it longer. */
static bool json_string(json *self, const char **text, size_t *length) {
    char *out = ++self->at;
    *text = out;
    while (self->at < self->end && *self->at != '"') {
        unsigned char c = (unsigned char)*self->at++;
        if (c < 0x20) return json_wrong(self, "is not valid JSON (a control character in a text)");
        if (c != '\\') {
            *out++ = (char)c;
        } else if (!json_escape(self, &out)) {
            return false;
        }
    }
    if (self->at == self->end) return json_wrong(self, "is not valid JSON (a text without end)");
    self->at++;
    *length = (size_t)(out - *text);
    *out = 0;
    return true;
}

static size_t json_digits(json *self) {
    const char *start = self->at;
    while (self->at < self->end && *self->at >= '0' && *self->at <= '9') self->at++;
    return (size_t)(self->at - start);
}

/* -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?, of at most 64 characters and below 1e308. */
static bool json_number(json *self, json_node *node) {
    long exponent = 0;
    node->text = self->at;
    if (*self->at == '-') self->at++;
    const char *first = self->at;
    size_t digits = json_digits(self);
    bool sound = digits && (*first != '0' || digits == 1);
    if (sound && self->at < self->end && *self->at == '.') {
        self->at++;
        sound = json_digits(self) > 0;
    }
    if (sound && self->at < self->end && (*self->at == 'e' || *self->at == 'E')) {
        self->at++;
        bool negative = self->at < self->end && *self->at == '-';
        if (self->at < self->end && (*self->at == '+' || *self->at == '-')) self->at++;
        const char *power = self->at;
        sound = json_digits(self) > 0;
        for (; !negative && power < self->at && exponent < 1000; power++) {
            exponent = exponent * 10 + (*power - '0');
        }
    }
    node->length = (size_t)(self->at - node->text);
    if (!sound) return json_wrong(self, "is not valid JSON (a broken number)");
    if (node->length > JSON_DIGITS) {
        return json_wrong(self, "has a number of %zu characters", node->length);
    }
    if (exponent + (long)digits > 308) {
        return json_wrong(self, "has the number %.*s, which is out of range", (int)node->length,
                          node->text);
    }
    return true;
}

static bool json_word(json *self, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(self->end - self->at) < length || memcmp(self->at, word, length)) {
        return json_wrong(self, "is not valid JSON");
    }
    self->at += length;
    return true;
}

/* The index of a new value, which is never 0; 0 on failure. */
static size_t json_add(json *self, const char *key) {
    if (self->count == JSON_VALUES) {
        json_wrong(self, "has more than %d values", JSON_VALUES);
        return 0;
    }
    if (self->count == self->room) {
        size_t room = self->room * 2;
        json_node *grown = realloc(self->nodes, room * sizeof *grown);
        if (!grown) {
            json_wrong(self, "does not fit into memory");
            return 0;
        }
        self->nodes = grown;
        self->room = room;
    }
    self->nodes[self->count] = (json_node){.key = key};
    return self->count++;
}

static bool json_value(json *self, size_t index, int depth);

static bool json_key(json *self, size_t parent, const char **key) {
    size_t length;
    if (json_peek(self) != '"') return json_wrong(self, "is not valid JSON (a key is missing)");
    if (!json_string(self, key, &length)) return false;
    for (size_t i = self->nodes[parent].child; i; i = self->nodes[i].next) {
        if (strcmp(self->nodes[i].key, *key) == 0) {
            return json_wrong(self, "has the key '%.100s' twice", *key);
        }
    }
    if (!json_take(self, ':')) return json_wrong(self, "is not valid JSON (a colon is missing)");
    return true;
}

static bool json_children(json *self, size_t parent, int depth) {
    bool object = *self->at++ == '{';
    char close = object ? '}' : ']';
    size_t last = 0, size = 0;
    self->nodes[parent].kind = object ? JSON_OBJECT : JSON_LIST;
    if (json_take(self, close)) return true;
    do {
        const char *key = NULL;
        if (object && size >= JSON_KEYS) {
            return json_wrong(self, "has an object of more than %d keys", JSON_KEYS);
        }
        if (object && !json_key(self, parent, &key)) return false;
        size_t index = json_add(self, key);
        if (!index) return false;
        if (last) {
            self->nodes[last].next = index;
        } else {
            self->nodes[parent].child = index;
        }
        self->nodes[parent].size = ++size;
        last = index;
        bool taken = false;
        if (object && self->reader &&
            !self->reader(self, self->nodes[parent].key, key, &taken)) return false;
        if (!taken && !json_value(self, index, depth + 1)) return false;
    } while (json_take(self, ','));
    return json_take(self, close) || json_wrong(self, "is not valid JSON (a bracket is not closed)");
}

static bool json_value(json *self, size_t index, int depth) {
    json_node value = self->nodes[index];
    bool sound;
    if (depth > JSON_DEPTH) return json_wrong(self, "is nested too deeply");
    switch (json_peek(self)) {
    case '{':
    case '[':
        return json_children(self, index, depth);
    case '"':
        value.kind = JSON_TEXT;
        sound = json_string(self, &value.text, &value.length);
        break;
    case 't':
    case 'f':
        value.kind = JSON_TRUTH;
        value.truth = *self->at == 't';
        sound = json_word(self, value.truth ? "true" : "false");
        break;
    case 'n':
        value.kind = JSON_NULL;
        sound = json_word(self, "null");
        break;
    case '-': case '0': case '1': case '2': case '3': case '4': case '5': case '6': case '7':
    case '8': case '9':
        value.kind = JSON_NUMBER;
        sound = json_number(self, &value);
        break;
    default:
        return json_wrong(self, "is not valid JSON");
    }
    self->nodes[index] = value;
    return sound;
}

static void json_free(json *self) {
    free(self->nodes);
    free(self->copy);
    self->nodes = NULL;
    self->copy = NULL;
}

/* Parses a whole text, with or without a byte order mark. On failure `why` has the reason. Call
 * json_free() in either case. `reader` may be NULL. */
static bool json_parse_with(json *self, const char *text, size_t length, json_reader reader,
                            void *user) {
    *self = (json){.room = 64, .reader = reader, .user = user};
    if (length >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) {
        text += 3;
        length -= 3;
    }
    if (!is_utf8(text, length)) return json_wrong(self, "is not UTF-8 text");
    if (memchr(text, 0, length)) return json_wrong(self, "has a NUL in it");
    self->copy = malloc(length + 1);
    self->nodes = malloc(self->room * sizeof *self->nodes);
    if (!self->copy || !self->nodes) return json_wrong(self, "does not fit into memory");
    memcpy(self->copy, text, length);
    self->copy[length] = 0;
    self->at = self->copy;
    self->end = self->copy + length;
    self->nodes[self->count++] = (json_node){.key = NULL};
    if (!json_value(self, 0, 0)) return false;
    return json_peek(self) < 0 || json_wrong(self, "is not valid JSON (text after its end)");
}

static bool json_parse(json *self, const char *text, size_t length) {
    return json_parse_with(self, text, length, NULL, NULL);
}

/* ---- reading a parsed value ------------------------------------------------------------------- */

/* The value of `key` in the object `parent`, NULL if there is none. */
static const json_node *json_get(const json *self, const json_node *parent, const char *key) {
    for (size_t i = parent->kind == JSON_OBJECT ? parent->child : 0; i; i = self->nodes[i].next) {
        if (strcmp(self->nodes[i].key, key) == 0) return &self->nodes[i];
    }
    return NULL;
}

static const json_node *json_first(const json *self, const json_node *parent) {
    return parent->child ? &self->nodes[parent->child] : NULL;
}

static const json_node *json_next(const json *self, const json_node *node) {
    return node->next ? &self->nodes[node->next] : NULL;
}

static bool json_is_text(const json_node *node, const char *expected) {
    return node && node->kind == JSON_TEXT && strcmp(node->text, expected) == 0;
}

/* A number as it was written; exact for up to 15 digits and powers of ten up to 22. Not strtod(),
 * which reads the decimal point of the program's language. */
static double json_double(const json_node *node) {
    const char *c = node->text, *end = c + node->length;
    bool negative = c < end && *c == '-', point = false;
    int power = 0, written = 0;
    uint64_t digits = 0;
    double scale = 1, value;
    for (c += negative; c < end && *c != 'e' && *c != 'E'; c++) {
        if (*c == '.') {
            point = true;
        } else if (digits < UINT64_MAX / 10 - 1) {
            digits = digits * 10 + (uint64_t)(*c - '0');
            power -= point;
        } else {
            power += !point;
        }
    }
    if (c < end) {
        bool below = ++c < end && *c == '-';
        for (c += c < end && (*c == '-' || *c == '+'); c < end && written < 1000; c++) {
            written = written * 10 + (*c - '0');
        }
        power += below ? -written : written;
    }
    value = (double)digits;
    for (int left = power < 0 ? -power : power; left; left--) {
        if (scale > 1e21) { /* larger powers of ten are not exact */
            value = power < 0 ? value / scale : value * scale;
            scale = 1;
        }
        scale *= 10;
    }
    value = power < 0 ? value / scale : value * scale;
    return negative ? -value : value;
}

/* Whether `node` is an integer from `low` to `high`, without fraction or exponent. */
static bool json_integer(const json_node *node, int64_t low, int64_t high, int64_t *out) {
    bool negative = node->kind == JSON_NUMBER && node->text[0] == '-';
    int64_t value = 0;
    if (node->kind != JSON_NUMBER || node->length > 15) return false;
    for (size_t i = negative ? 1 : 0; i < node->length; i++) {
        if (node->text[i] < '0' || node->text[i] > '9') return false;
        value = value * 10 + (node->text[i] - '0');
    }
    *out = negative ? -value : value;
    return *out >= low && *out <= high;
}

#endif
