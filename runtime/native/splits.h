/* How a text is split into words before merges: the patterns of byte-level vocabularies.
 *
 * A tokenizer.json has them as regular expressions. These are the ones of Llama's kin, recognized
 * by their exact text, each written as a scanner. A test compares them with the library
 * `tokenizers`.
 */
#ifndef LLAMA_ONNX_SPLITS_H
#define LLAMA_ONNX_SPLITS_H

#include "json.h"
#include "unicode.h"

typedef enum { SPLIT_NUMBER, SPLIT_GPT2, SPLIT_LLAMA3, SPLIT_QWEN2, SPLIT_TEKKEN } split_kind;

#define SPLIT_ENDS "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define SPLIT_SHORT "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define SPLIT_UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define SPLIT_LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"

static const struct split_pattern {
    split_kind kind;
    const char *text;
} split_patterns[] = {
    {SPLIT_NUMBER, "\\p{N}"},
    {SPLIT_GPT2, "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+"
                 "|\\s+(?!\\S)|\\s+"},
    {SPLIT_LLAMA3, SPLIT_SHORT "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
                               "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" SPLIT_ENDS},
    {SPLIT_QWEN2, SPLIT_SHORT "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
                              "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" SPLIT_ENDS},
    {SPLIT_TEKKEN, "[^\\r\\n\\p{L}\\p{N}]?" SPLIT_UPPER "*" SPLIT_LOWER "+"
                   "|[^\\r\\n\\p{L}\\p{N}]?" SPLIT_UPPER "+" SPLIT_LOWER "*|\\p{N}"
                   "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*" SPLIT_ENDS},
};

/* The place of a scanner in a text, which is UTF-8. */
typedef struct scan {
    const char *at, *end;
} scan;

/* The character at `c`, and its size. */
static uint32_t scan_code(const char *c, size_t *size) {
    const unsigned char *u = (const unsigned char *)c;
    if (u[0] < 0x80) return *size = 1, u[0];
    if (u[0] < 0xe0) return *size = 2, (u[0] & 0x1fu) << 6 | (u[1] & 0x3fu);
    if (u[0] < 0xf0) {
        return *size = 3, (u[0] & 0xfu) << 12 | (u[1] & 0x3fu) << 6 | (u[2] & 0x3fu);
    }
    return *size = 4, (u[0] & 7u) << 18 | (u[1] & 0x3fu) << 12 | (u[2] & 0x3fu) << 6 |
                          (u[3] & 0x3fu);
}

static unicode_class scan_class(const char *c, const char *end, size_t *size) {
    *size = 0;
    return c < end ? class_of(scan_code(c, size)) : UNICODE_OTHER;
}

/* Sets of classes, and of all characters that have none: bit 0. */
enum {
    SET_LETTERS = 1 << UNICODE_UPPER | 1 << UNICODE_LOWER | 1 << UNICODE_LETTER,
    SET_NUMBERS = 1 << UNICODE_NUMBER,
    SET_SPACES = 1 << UNICODE_SPACE,
    SET_SIGNS = 1 << UNICODE_OTHER | 1 << UNICODE_MARK,
    SET_UPPER = 1 << UNICODE_UPPER | 1 << UNICODE_LETTER | 1 << UNICODE_MARK,
    SET_LOWER = 1 << UNICODE_LOWER | 1 << UNICODE_LETTER | 1 << UNICODE_MARK
};

/* The end of the run of characters in `set` that starts at `c`, at most `most` of them. */
static const char *scan_run(const char *c, const char *end, unsigned set, size_t most) {
    size_t size;
    while (most-- && c < end && (set >> scan_class(c, end, &size) & 1)) c += size;
    return c;
}

/* "'s" and so on; NULL if there is none. With `any_case`, the long s is an s too. */
static const char *scan_short(const char *c, const char *end, bool any_case) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    if (c == end || *c != '\'') return NULL;
    c++;
    if (any_case && end - c >= 2 && memcmp(c, "\xc5\xbf", 2) == 0) return c + 2;
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        const char *letter = endings[i], *at = c;
        for (; *letter && at < end; letter++, at++) {
            char low = any_case && *at >= 'A' && *at <= 'Z' ? (char)(*at + 32) : *at;
            if (low != *letter) break;
        }
        if (!*letter) return at;
    }
    return NULL;
}

/* " ?SET+", NULL if it does not match. */
static const char *scan_spaced(const char *c, const char *end, unsigned set) {
    const char *start = *c == ' ' ? c + 1 : c, *stop = scan_run(start, end, set, SIZE_MAX);
    return stop > start ? stop : NULL;
}

/* The spaces at `c`: up to the last line break if `breaks`; before a word, all but one. */
static const char *scan_spaces(const char *c, const char *end, bool breaks) {
    const char *stop = c, *last = c, *line = NULL;
    for (size_t size; stop < end && scan_class(stop, end, &size) == UNICODE_SPACE; stop += size) {
        last = stop;
        if (*stop == '\r' || *stop == '\n') line = stop + 1;
    }
    if (breaks && line) return line;
    return stop < end && last > c ? last : stop;
}

/* "[^\r\n\p{L}\p{N}]?", of which a character of `set` must follow: the start of that. */
static const char *scan_before(const char *c, const char *end, unsigned set) {
    size_t size, next;
    unicode_class one = scan_class(c, end, &size);
    bool may = *c != '\r' && *c != '\n' && !((SET_LETTERS | SET_NUMBERS) >> one & 1);
    if (may && c + size < end && (set >> scan_class(c + size, end, &next) & 1)) return c + size;
    return set >> one & 1 ? c : NULL;
}

/* "UPPER*LOWER+" at `c`; NULL if it does not match. A letter without case is both. */
static const char *scan_capitalized(const char *c, const char *end) {
    const char *both = NULL, *stop = c;
    size_t size;
    unicode_class kind = UNICODE_OTHER;
    while (stop < end && (SET_UPPER >> (kind = scan_class(stop, end, &size)) & 1)) {
        stop += size;
        if (SET_LOWER >> kind & 1) both = stop;
    }
    const char *lower = scan_run(stop, end, SET_LOWER, SIZE_MAX);
    return lower > stop ? lower : both;
}

static const char *scan_tekken_word(const char *c, const char *end) {
    size_t size;
    unicode_class one = scan_class(c, end, &size);
    bool may = *c != '\r' && *c != '\n' && !((SET_LETTERS | SET_NUMBERS) >> one & 1);
    const char *starts[2] = {may ? c + size : NULL, c}, *stop;
    for (int i = 0; i < 2; i++) {
        if (starts[i] && (stop = scan_capitalized(starts[i], end)) != NULL) return stop;
    }
    for (int i = 0; i < 2; i++) {
        if (!starts[i]) continue;
        stop = scan_run(starts[i], end, SET_UPPER, SIZE_MAX);
        if (stop > starts[i]) return scan_run(stop, end, SET_LOWER, SIZE_MAX);
    }
    return NULL;
}

static const char *scan_gpt2(const char *c, const char *end) {
    const char *stop = scan_short(c, end, false);
    if (!stop) stop = scan_spaced(c, end, SET_LETTERS);
    if (!stop) stop = scan_spaced(c, end, SET_NUMBERS);
    if (!stop) stop = scan_spaced(c, end, SET_SIGNS);
    return stop ? stop : scan_spaces(c, end, false);
}

static const char *scan_llama3(const char *c, const char *end, split_kind kind) {
    bool tekken = kind == SPLIT_TEKKEN;
    const char *stop = tekken ? scan_tekken_word(c, end) : scan_short(c, end, true);
    if (stop) return stop;
    const char *word = tekken ? NULL : scan_before(c, end, SET_LETTERS);
    if (word) return scan_run(word, end, SET_LETTERS, SIZE_MAX);
    stop = scan_run(c, end, SET_NUMBERS, kind == SPLIT_LLAMA3 ? 3 : 1);
    if (stop > c) return stop;
    stop = scan_spaced(c, end, SET_SIGNS);
    if (!stop) return scan_spaces(c, end, true);
    while (stop < end && (*stop == '\r' || *stop == '\n' || (tekken && *stop == '/'))) stop++;
    return stop;
}

/* The next piece of a text that is not empty. */
static const char *split_next(split_kind kind, const char *c, const char *end) {
    size_t size;
    if (kind == SPLIT_GPT2) return scan_gpt2(c, end);
    if (kind != SPLIT_NUMBER) return scan_llama3(c, end, kind);
    if (scan_class(c, end, &size) == UNICODE_NUMBER) return c + size;
    return scan_run(c, end, ~(unsigned)SET_NUMBERS, SIZE_MAX);
}

#endif
