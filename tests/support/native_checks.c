/* The checks of the C library, for tests that do not open a model. */
#define _GNU_SOURCE
#include "config.h"
#include "files.h"
#include "graph.h"
#include "messages.h"
#include "template.h"

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
                          GRAPH_INPUT, GRAPH_FOLDS, GRAPH_READERS, GRAPH_TABLE};
    return limits[which];
}
