/* Changes inputs of the C library's readers at random; built with sanitizers, which end it at the
 * first access out of bounds, leak or undefined step.
 *
 *     fuzz SECONDS SEED KIND FILE [KIND FILE]...
 *
 * KIND is what reads FILE: tokenizer, template, messages, session, certificate (reference.safetensors
 * with certificate.json beside it), config or graph.
 */
#define _GNU_SOURCE
#include "generating.h"
#include "session_file.h"
#include "verifying.h"

enum { MOST_SEEDS = 64, MOST_GROWTH = 256 };

typedef struct seed {
    const char *kind;
    char *text, *beside;
    size_t size, beside_size;
} seed;

static uint64_t state;
static size_t below(size_t most) { return most ? (size_t)(random_bits(&state) % most) : 0; }

static const char *const words[] = {
    "{", "}", "[", "]", "\"", ",", ":", "\\u0000", "\\ud800", "null", "true", "-1", "1e308",
    "99999999999999999999", "\xff", "\xf0\x9f", "\xe2\x96\x81", "{%", "%}", "{{", "}}", "<0x41>",
    "\"id\"", "\"vocab\"", "\"merges\"", "\"tokens\"", "\"Sequence\"", "4294967295", "16777216",
};

/* Changes `text` in up to eight places; it has room for MOST_GROWTH bytes more. */
static size_t mutate(char *text, size_t size, const seed *other) {
    size_t room = size + MOST_GROWTH;
    for (size_t left = 1 + below(8); left; left--) {
        size_t at = below(size), length = 1 + below(below(4) ? 4 : 64);
        if (length > size - at) length = size - at;
        const char *word = words[below(sizeof words / sizeof *words)];
        size_t wide = strlen(word), from = below(other->size);
        switch (below(6)) {
        case 0: if (size) text[at] ^= (char)(1 << below(8)); break;
        case 1: if (size) text[at] = (char)below(256); break;
        case 2:
            memmove(text + at, text + at + length, size - at - length);
            size -= length;
            break;
        case 3:
            if (size + wide > room) break;
            memmove(text + at + wide, text + at, size - at);
            memcpy(text + at, word, wide);
            size += wide;
            break;
        case 4:
            if (length > other->size - from) length = other->size - from;
            memcpy(text + at, other->text + from, length < size - at ? length : size - at);
            break;
        default:
            if (size + length > room) break;
            memmove(text + at + length, text + at, size - at);
            size += length;
        }
    }
    return size;
}

static void read_vocabulary(const char *text, size_t size) {
    static const char *const texts[] = {"", "a  b\xe6\x97\xa5 1234 it's", "<s>the\n\n x</s>",
                                        "aaaaaaaaaaaaaaaaaaaaaaaaa"};
    char why[WHY];
    vocabulary *read = vocabulary_read(text, size, why);
    for (size_t i = 0; read && i < sizeof texts / sizeof *texts; i++) {
        ids found = {0};
        buffer out = {0};
        decoder back = {.words = read, .strip = read->strips};
        tokenizer_encode(read, texts[i], strlen(texts[i]), true, &found);
        for (size_t k = 0; k < found.count; k++) decoder_put(&back, found.all[k], &out);
        for (int k = 0; k < 20; k++) decoder_put(&back, (int32_t)below(1000) - 10, &out);
        decoder_flush(&back, &out);
        if (!is_utf8(out.text ? out.text : "", out.size) && is_utf8(text, size)) abort();
        free(found.all);
        free(out.text);
    }
    vocabulary_free(read);
}

static void read_conversation(const char *text) {
    buffer written = {0};
    weights weights;
    char why[WHY];
    if (read_messages(text, &written, &weights, why)) {
        template_check("{% for m in messages %}{{ m.content }}{% endfor %}", 49, weights, why);
    }
    free(written.text);
}

static void check_text(const char *text, size_t size) {
    char why[WHY];
    const weights some = {.messages = 5, .bytes = 1000, .longest = 300, .extra = 10};
    template_opens(text, size, why); /* whatever the bytes are */
    if (is_utf8(text, size) && !memchr(text, 0, size)) template_check(text, size, some, why);
}

static void read_saved(const char *text, size_t size) {
    llama_onnx model = {.config = {.vocab_size = 288, .context_length = 256}};
    llama_onnx_session read = {.model = &model, .max_tokens = 256};
    json file;
    if (json_parse(&file, text, size) && file.nodes->kind == JSON_OBJECT) {
        read_parts_of(&read, &file, "file");
    }
    json_free(&file);
    free(read.tokens.all);
    free(read.messages.text);
    free(read.ends);
}

static void read_reference(const seed *one, const char *text, size_t size) {
    char why[SENTENCE] = "";
    certificate read = {.why = why, .reference_size = size};
    float logits[288] = {0};
    bool mask[288] = {false};
    read.reference = malloc(size + 1);
    memcpy(read.reference, text, size);
    if (json_parse(&read.content, one->beside, one->beside_size) && read_passages(&read, 288)) {
        for (size_t i = 0; i < read.count; i++) {
            figures of = {0};
            bool differs;
            for (size_t k = 0; k + 1 < read.passages[i].count; k++) {
                figures_add(&of, &read.passages[i], k, logits, 288, mask);
                diverges(&read.passages[i], k, logits, 288, &differs);
            }
        }
    }
    certificate_free(&read);
}

static void run(const seed *one, char *text, size_t size) {
    char why[WHY];
    config found = {0};
    text[size] = 0;
    if (strcmp(one->kind, "tokenizer") == 0) read_vocabulary(text, size);
    if (strcmp(one->kind, "template") == 0) check_text(text, size);
    if (strcmp(one->kind, "messages") == 0) read_conversation(text);
    if (strcmp(one->kind, "session") == 0) read_saved(text, size);
    if (strcmp(one->kind, "certificate") == 0) read_reference(one, text, size);
    if (strcmp(one->kind, "config") == 0) config_read(text, size, &found, why);
    if (strcmp(one->kind, "graph") == 0) graph_read(text, size, 1 << 20, &found, why);
}

static char *read_seed(const char *path, size_t *size) {
    FILE *file = open_file(path);
    if (!file) exit(64);
    *size = (size_t)file_size(file);
    char *text = malloc(*size + 1);
    if (!text || fread(text, 1, *size, file) != *size) exit(64);
    fclose(file);
    return text;
}

int main(int argc, char **argv) {
    seed seeds[MOST_SEEDS];
    size_t count = 0, runs = 0;
    if (argc < 5) return 64;
    state = (uint64_t)atoll(argv[2]);
    for (int i = 3; i + 1 < argc && count < MOST_SEEDS; i += 2) {
        seed *one = &seeds[count++];
        *one = (seed){.kind = argv[i]};
        one->text = read_seed(argv[i + 1], &one->size);
        if (strcmp(one->kind, "certificate") == 0) {
            char path[4096];
            snprintf(path, sizeof path, "%.*s/certificate.json",
                     (int)(strrchr(argv[i + 1], '/') - argv[i + 1]), argv[i + 1]);
            one->beside = read_seed(path, &one->beside_size);
        }
    }
    for (double end = now() + atof(argv[1]); now() < end; runs++) {
        const seed *one = &seeds[below(count)];
        char *text = malloc(one->size + MOST_GROWTH + 1);
        memcpy(text, one->text, one->size);
        size_t size = runs < count ? one->size : mutate(text, one->size, &seeds[below(count)]);
        /* In a place of its own size, so that reading behind it is found. */
        char *exact = malloc(size + 1);
        memcpy(exact, text, size);
        free(text);
        run(one, exact, size);
        free(exact);
    }
    for (size_t i = 0; i < count; i++) {
        free(seeds[i].text);
        free(seeds[i].beside);
    }
    printf("%zu inputs\n", runs);
    return 0;
}
