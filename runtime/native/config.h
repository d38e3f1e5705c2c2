/* genai_config.json: which keys it may have, and which values.
 *
 * onnxruntime-genai obeys more keys than a package needs: one names a library that it loads and
 * runs, one a file that it writes, and the names of inputs are formats of printf. Anything that is
 * not on this list is refused before onnxruntime-genai sees the file.
 */
#ifndef LLAMA_ONNX_CONFIG_H
#define LLAMA_ONNX_CONFIG_H

#include "json.h"

/* Limits of integers. */
#define ANY_INT 2147483647
#define LAYERS 4096
#define HEADS 65536
#define VALUES 16777216
#define THREADS 65536
#define MOST_IDS 1000

#define MODEL_FILE "model.onnx"

typedef enum {
    KEY_OBJECT,   /* an object, whose own keys are listed */
    KEY_INTEGER,  /* an integer from `low` to `high` */
    KEY_INTEGERS, /* the same, or a list of them */
    KEY_NUMBER,   /* a number */
    KEY_TRUTH,    /* true or false */
    KEY_TEXT,     /* exactly `text` */
    KEY_PROVIDERS /* [] or a list of one object such as {"cuda": {}}, with `config_options` only */
} key_kind;

#define CONFIG_KEYS(K)                                                                          \
    K("model", KEY_OBJECT, 0, 0, NULL)                                                          \
    K("model.type", KEY_TEXT, 0, 0, "llama")                                                    \
    K("model.context_length", KEY_INTEGER, 1, ANY_INT, NULL)                                    \
    K("model.vocab_size", KEY_INTEGER, 1, VALUES, NULL)                                         \
    K("model.bos_token_id", KEY_INTEGER, 0, ANY_INT, NULL)                                      \
    K("model.eos_token_id", KEY_INTEGERS, 0, ANY_INT, NULL)                                     \
    K("model.pad_token_id", KEY_INTEGER, 0, ANY_INT, NULL)                                      \
    K("model.decoder", KEY_OBJECT, 0, 0, NULL)                                                  \
    K("model.decoder.filename", KEY_TEXT, 0, 0, MODEL_FILE)                                     \
    K("model.decoder.head_size", KEY_INTEGER, 1, HEADS, NULL)                                   \
    K("model.decoder.hidden_size", KEY_INTEGER, 1, VALUES, NULL)                                \
    K("model.decoder.num_attention_heads", KEY_INTEGER, 1, HEADS, NULL)                         \
    K("model.decoder.num_hidden_layers", KEY_INTEGER, 1, LAYERS, NULL)                          \
    K("model.decoder.num_key_value_heads", KEY_INTEGER, 1, HEADS, NULL)                         \
    K("model.decoder.session_options", KEY_OBJECT, 0, 0, NULL)                                  \
    K("model.decoder.session_options.log_id", KEY_TEXT, 0, 0, "onnxruntime-genai")              \
    K("model.decoder.session_options.intra_op_num_threads", KEY_INTEGER, 0, THREADS, NULL)      \
    K("model.decoder.session_options.provider_options", KEY_PROVIDERS, 0, 0, NULL)              \
    K("model.decoder.inputs", KEY_OBJECT, 0, 0, NULL)                                           \
    K("model.decoder.inputs.input_ids", KEY_TEXT, 0, 0, "input_ids")                            \
    K("model.decoder.inputs.attention_mask", KEY_TEXT, 0, 0, "attention_mask")                  \
    K("model.decoder.inputs.past_key_names", KEY_TEXT, 0, 0, "past_key_values.%d.key")          \
    K("model.decoder.inputs.past_value_names", KEY_TEXT, 0, 0, "past_key_values.%d.value")      \
    K("model.decoder.outputs", KEY_OBJECT, 0, 0, NULL)                                          \
    K("model.decoder.outputs.logits", KEY_TEXT, 0, 0, "logits")                                 \
    K("model.decoder.outputs.present_key_names", KEY_TEXT, 0, 0, "present.%d.key")              \
    K("model.decoder.outputs.present_value_names", KEY_TEXT, 0, 0, "present.%d.value")          \
    K("search", KEY_OBJECT, 0, 0, NULL)                                                         \
    K("search.do_sample", KEY_TRUTH, 0, 0, NULL)                                                \
    K("search.max_length", KEY_INTEGER, 1, ANY_INT, NULL)                                       \
    K("search.min_length", KEY_INTEGER, 0, ANY_INT, NULL)                                       \
    K("search.no_repeat_ngram_size", KEY_NUMBER, 0, 0, NULL)                                   \
    K("search.num_beams", KEY_INTEGER, 1, 1, NULL)                                              \
    K("search.num_return_sequences", KEY_INTEGER, 1, 1, NULL)                                   \
    K("search.past_present_share_buffer", KEY_TRUTH, 0, 0, NULL)                                \
    K("search.repetition_penalty", KEY_NUMBER, 0, 0, NULL)                                      \
    K("search.temperature", KEY_NUMBER, 0, 0, NULL)                                             \
    K("search.top_k", KEY_NUMBER, 0, 0, NULL)                                                  \
    K("search.top_p", KEY_NUMBER, 0, 0, NULL)

static const struct config_key {
    const char *path;
    key_kind kind;
    int64_t low, high;
    const char *text;
} config_keys[] = {
#define ENTRY(path, kind, low, high, text) {path, kind, low, high, text},
    CONFIG_KEYS(ENTRY)
#undef ENTRY
};

/* onnxruntime-genai's names of the execution providers that packages are made for. */
static const char *const config_providers[] = {"cuda", "dml", "webgpu"};

/* Their options, with the values that a package may give them. */
static const struct config_option {
    const char *provider, *name, *value;
} config_options[] = {
    {"dml", "device_id", "0"},
    {"dml", "enable_graph_capture", "0"},
    {"dml", "enable_graph_capture", "1"},
};

/* What the library itself needs from genai_config.json. `bos` is -1 if there is none; `ends` are the
 * tokens that end an answer. */
typedef struct config {
    int context_length, vocab_size, layers, heads, head_size, bos;
    int32_t ends[MOST_IDS];
    size_t end_count;
    bool samples;
    double temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size;
} config;

/* Whether `node` is a number of less than ten digits before the point, without an exponent above. */
static bool is_small_number(const json_node *node) {
    if (node->kind != JSON_NUMBER) return false;
    size_t sign = node->text[0] == '-', digits = sign;
    while (digits < node->length && node->text[digits] >= '0' && node->text[digits] <= '9') digits++;
    for (size_t i = digits; i + 1 < node->length; i++) {
        if ((node->text[i] == 'e' || node->text[i] == 'E') && node->text[i + 1] != '-') return false;
    }
    return digits - sign < 10;
}

static bool config_option_known(const char *provider, const json_node *option) {
    for (size_t i = 0; i < sizeof config_options / sizeof *config_options; i++) {
        const struct config_option *known = &config_options[i];
        if (strcmp(provider, known->provider) == 0 && strcmp(option->key, known->name) == 0 &&
            json_is_text(option, known->value)) return true;
    }
    return false;
}

static bool config_provider(const json *text, const json_node *entry) {
    const json_node *only = entry->kind == JSON_OBJECT ? json_first(text, entry) : NULL;
    if (!only || entry->size != 1 || only->kind != JSON_OBJECT) return false;
    for (const json_node *i = json_first(text, only); i; i = json_next(text, i)) {
        if (!config_option_known(only->key, i)) return false;
    }
    for (size_t i = 0; i < sizeof config_providers / sizeof *config_providers; i++) {
        if (strcmp(only->key, config_providers[i]) == 0) return true;
    }
    return false;
}

static bool config_sound(const json *text, const json_node *node, const struct config_key *key) {
    int64_t value;
    bool list = node->kind == JSON_LIST;
    switch (key->kind) {
    case KEY_OBJECT:
        return node->kind == JSON_OBJECT;
    case KEY_INTEGER:
        return json_integer(node, key->low, key->high, &value);
    case KEY_INTEGERS:
        if (!list) return json_integer(node, key->low, key->high, &value);
        for (const json_node *i = json_first(text, node); i; i = json_next(text, i)) {
            if (!json_integer(i, key->low, key->high, &value)) return false;
        }
        return node->size > 0 && node->size <= MOST_IDS;
    case KEY_NUMBER:
        return is_small_number(node);
    case KEY_TRUTH:
        return node->kind == JSON_TRUTH;
    case KEY_TEXT:
        return json_is_text(node, key->text);
    case KEY_PROVIDERS:
        for (const json_node *i = list ? json_first(text, node) : NULL; i; i = json_next(text, i)) {
            if (!config_provider(text, i)) return false;
        }
        return list && node->size <= 1;
    }
    return false;
}

static bool config_check(const json *text, const json_node *object, const char *prefix,
                         char why[WHY]) {
    char path[128];
    for (const json_node *node = json_first(text, object); node; node = json_next(text, node)) {
        const struct config_key *known = NULL;
        snprintf(path, sizeof path, "%s%s%s", prefix, *prefix ? "." : "", node->key);
        /* A key with a dot inside could pass for a path. */
        bool dotted = strchr(node->key, '.') || strlen(node->key) > 64;
        for (size_t i = 0; !dotted && i < sizeof config_keys / sizeof *config_keys; i++) {
            if (strcmp(config_keys[i].path, path) == 0) known = &config_keys[i];
        }
        if (!known) {
            explain(why, "sets %.100s, which a package may not set", path);
            return false;
        }
        if (!config_sound(text, node, known)) {
            explain(why, "sets %s to a value that a package may not have", path);
            return false;
        }
        if (known->kind == KEY_OBJECT && !config_check(text, node, path, why)) return false;
    }
    return true;
}

/* The integer `key` of `object`, 0 if there is none. */
static int config_integer(const json *text, const json_node *object, const char *key) {
    const json_node *node = object ? json_get(text, object, key) : NULL;
    int64_t value = 0;
    return node && json_integer(node, 0, ANY_INT, &value) ? (int)value : 0;
}

/* The number `key` of `object`, or `other` if there is none. */
static double config_number(const json *text, const json_node *object, const char *key,
                            double other) {
    const json_node *node = object ? json_get(text, object, key) : NULL;
    return node && node->kind == JSON_NUMBER ? json_double(node) : other;
}

static void config_search(const json *text, config *out) {
    const json_node *search = json_get(text, text->nodes, "search");
    const json_node *samples = search ? json_get(text, search, "do_sample") : NULL;
    out->samples = samples && samples->kind == JSON_TRUTH && samples->truth;
    out->temperature = config_number(text, search, "temperature", 1);
    out->top_k = config_number(text, search, "top_k", 0);
    out->top_p = config_number(text, search, "top_p", 1);
    out->repetition_penalty = config_number(text, search, "repetition_penalty", 1);
    out->no_repeat_ngram_size = config_number(text, search, "no_repeat_ngram_size", 0);
}

/* The first and last tokens, which config_tokens() has checked. */
static void config_special(const json *text, config *out) {
    const json_node *model = json_get(text, text->nodes, "model");
    const json_node *bos = json_get(text, model, "bos_token_id");
    const json_node *eos = json_get(text, model, "eos_token_id");
    bool list = eos && eos->kind == JSON_LIST;
    int64_t id;
    out->bos = bos && json_integer(bos, 0, ANY_INT, &id) ? (int)id : -1;
    for (const json_node *i = list ? json_first(text, eos) : eos; i && out->end_count < MOST_IDS;
         i = list ? json_next(text, i) : NULL) {
        if (json_integer(i, 0, ANY_INT, &id)) out->ends[out->end_count++] = (int32_t)id;
    }
}

static void config_sizes(const json *text, config *out) {
    const json_node *model = json_get(text, text->nodes, "model");
    const json_node *decoder = model ? json_get(text, model, "decoder") : NULL;
    out->context_length = config_integer(text, model, "context_length");
    out->vocab_size = config_integer(text, model, "vocab_size");
    out->layers = config_integer(text, decoder, "num_hidden_layers");
    out->heads = config_integer(text, decoder, "num_key_value_heads");
    out->head_size = config_integer(text, decoder, "head_size");
}

/* Whether the special tokens are in the vocabulary: onnxruntime-genai writes to their places. */
static bool config_tokens(const json *text, int vocab_size) {
    static const char *const keys[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
    const json_node *model = json_get(text, text->nodes, "model");
    int64_t id;
    for (size_t k = 0; model && k < sizeof keys / sizeof *keys; k++) {
        const json_node *node = json_get(text, model, keys[k]);
        bool list = node && node->kind == JSON_LIST;
        for (const json_node *i = list ? json_first(text, node) : node; i;
             i = list ? json_next(text, i) : NULL) {
            if (!json_integer(i, 0, vocab_size - 1, &id)) return false;
        }
    }
    return true;
}

/* Reads genai_config.json. On failure `why` says what is wrong, to follow the file's name. */
static bool config_read(const char *bytes, size_t length, config *out, char why[WHY]) {
    json text;
    *out = (config){.bos = -1};
    /* onnxruntime-genai has its own parser: without escapes both read the same keys. */
    bool plain = !memchr(bytes, '\\', length), sound = json_parse(&text, bytes, length) && plain;
    if (!plain) {
        explain(why, "has a backslash, which a package may not have there");
    } else if (!sound) {
        explain(why, "%s", text.why);
    } else if (text.nodes->kind != JSON_OBJECT) {
        explain(why, "is not a JSON object");
        sound = false;
    } else {
        sound = config_check(&text, text.nodes, "", why);
    }
    if (sound) {
        config_sizes(&text, out);
        sound = out->context_length && out->vocab_size;
        if (!sound) {
            explain(why, "has no %s", out->context_length ? "size of the vocabulary"
                                                          : "context length");
        } else if (!config_tokens(&text, out->vocab_size)) {
            explain(why, "has a special token that is not in the vocabulary");
            sound = false;
        } else {
            config_special(&text, out);
            config_search(&text, out);
        }
    }
    json_free(&text);
    return sound;
}

#endif
