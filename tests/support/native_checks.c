/* The checks of the C library, for tests that do not open a model. */
#define _GNU_SOURCE
#include "config.h"
#include "files.h"
#include "graph.h"
#include "messages.h"
#include "template.h"
#include "tokenizer.h"

/* Each returns 1 if its input is accepted; otherwise `why` says what is wrong. */
int check_json(const char *text, size_t length, char *why) {
    json parsed;
    bool sound = json_parse(&parsed, text, length);
    explain(why, "%s", parsed.why);
    json_free(&parsed);
    return sound;
}

int check_config(const char *text, size_t length, char *why) {
    config found;
    return config_read(text, length, &found, why);
}

int check_name(const char *name) { return is_plain_name(name); }

/* `out` receives the messages as the library passes them on. */
int check_messages(const char *text, char *out, size_t room, char *why) {
    buffer written = {0};
    weights weights;
    bool sound = read_messages(text, &written, &weights, why);
    if (sound) snprintf(out, room, "%s", written.text);
    free(written.text);
    return sound;
}

int check_template(const char *text, const char *messages, char *why) {
    buffer written = {0};
    weights weights;
    bool sound = read_messages(messages, &written, &weights, why) &&
                 template_check(text, strlen(text), weights, why);
    free(written.text);
    return sound;
}

/* The keys that genai_config.json may have, one by one; NULL at the end. */
const char *config_key(size_t index) {
    return index < sizeof config_keys / sizeof *config_keys ? config_keys[index].path : NULL;
}

/* `sizes` receives layers, heads, head size and vocabulary. */
int check_model(const char *bytes, size_t length, uint64_t data_size, int sizes[4], char *why) {
    config found = {0};
    bool sound = graph_read(bytes, length, data_size, &found, why);
    sizes[0] = found.layers;
    sizes[1] = found.heads;
    sizes[2] = found.head_size;
    sizes[3] = found.vocab_size;
    return sound;
}

/* The operators that a graph may have, as "domain:name", one by one; false at the end. */
int operator_name(size_t index, char *out, size_t room) {
    if (index >= sizeof graph_operators / sizeof *graph_operators) return 0;
    snprintf(out, room, "%s:%s", graph_operators[index].domain, graph_operators[index].name);
    return 1;
}

unsigned tensor_bits(uint64_t kind) { return graph_bits(kind); }
int graph_limit(int which) {
    const int limits[] = {GRAPH_BYTES, GRAPH_FIELDS, GRAPH_DIMENSIONS, GRAPH_TEXT,
                          GRAPH_INPUT, GRAPH_FOLDS, GRAPH_READERS, GRAPH_TABLE, GRAPH_JOINED};
    return limits[which];
}

/* NULL if the tokenizer.json is damaged or not supported. */
void *open_tokenizer(const char *text, size_t length, char *why) {
    return vocabulary_read(text, length, why);
}

void close_tokenizer(void *words) { vocabulary_free(words); }

/* Returns how many tokens the text has, -1 on failure; `out` receives the first `room`. */
int64_t encode_text(const void *words, const char *text, size_t length, int around, int32_t *out,
                    size_t room) {
    ids found = {0};
    bool sound = tokenizer_encode(words, text, length, around != 0, &found);
    for (size_t i = 0; i < found.count && i < room; i++) out[i] = found.all[i];
    free(found.all);
    return sound ? (int64_t)found.count : -1;
}

/* Writes the text of tokens, decoded one by one, with a NUL after the piece of each if `pieces`;
 * returns its size. Half a character at the end is given up if `flush`. */
size_t decode_tokens(const void *words, const int32_t *ids, size_t count, int start, int pieces,
                     int flush, char *out, size_t room) {
    const vocabulary *known = words;
    decoder state = {.words = known, .strip = start && known->strips};
    buffer text = {0};
    for (size_t i = 0; i < count; i++) {
        decoder_put(&state, ids[i], &text);
        if (pieces) put_bytes(&text, "", 1);
    }
    if (flush) decoder_flush(&state, &text);
    size_t size = text.size < room ? text.size : room;
    if (size) memcpy(out, text.text, size);
    free(text.text);
    return size;
}
