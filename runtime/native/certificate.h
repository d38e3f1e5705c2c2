/* The certificate of a package: what its weights compute, and how far the package may be from it.
 *
 * parity/certificate.json has hashes and limits, parity/reference.safetensors the likeliest logits
 * at each position of a few passages. The check is that of the Python runtime (measure/verify.py).
 */
#ifndef LLAMA_ONNX_CERTIFICATE_H
#define LLAMA_ONNX_CERTIFICATE_H

#include "buffer.h"
#include "files.h"
#include "json.h"

#include <math.h>

enum { PASSAGES = 64, LONGEST_PASSAGE = 4096, CERTIFICATE_BYTES = 2000000, CERTIFICATE_FORMAT = 1 };

#define CERTIFICATE_FILE "parity/certificate.json"
#define REFERENCE_FILE "parity/reference.safetensors"
#define NEAR_TIE 2e-3 /* in logits: two tokens so close may swap places */

/* A limit on what a replay measures; "every" applies to all. These are the rows of the Python
 * runtime's thresholds.csv that a replay uses; a test compares them. A package is not believed about
 * itself: its certificate can only add to them. */
static const struct limit {
    const char *precision, *activations, *provider, *quantizer, *measure, *metric;
    double most;
} limits[] = {
    {"every", "fp32", "cpu", "every", "shipped", "max_abs", 1e-3},
    {"every", "fp32", "cpu", "every", "shipped", "relative_l2", 1e-5},
    {"every", "fp32", "cpu", "every", "shipped", "mean_kl", 1e-6},
    {"every", "fp32", "cpu", "every", "replay", "divergences", 0},
    {"every", "fp32", "cuda", "every", "shipped", "relative_l2", 2e-3},
    {"every", "fp32", "directml", "every", "shipped", "relative_l2", 2e-3},
    {"every", "fp32", "webgpu", "every", "shipped", "relative_l2", 2e-3},
    {"every", "fp16", "every", "every", "shipped", "relative_l2", 0.03},
    {"every", "fp16", "every", "every", "shipped", "mean_kl", 0.01},
    {"every", "bf16", "every", "every", "shipped", "relative_l2", 0.2},
    {"every", "bf16", "every", "every", "shipped", "mean_kl", 0.1},
    {"every", "int8", "every", "every", "shipped", "relative_l2", 0.1},
    {"every", "int8", "every", "every", "shipped", "mean_kl", 0.05},
};

/* A prompt and a continuation: at each position the `kept` largest logits of the package's weights,
 * the largest first. */
typedef struct passage {
    int32_t *tokens;
    size_t count, prompt, kept;
    int32_t *ids;
    float *logits;
    double *logsumexp;
    const char *text; /* NULL if the passage is not a text */
    size_t text_length;
} passage;

typedef struct certificate {
    json content;
    char *reference;
    size_t reference_size;
    passage passages[PASSAGES];
    size_t count;
    const char *precision, *activations;
    char *why; /* SENTENCE characters */
} certificate;

static bool certificate_wrong(certificate *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (!*self->why) vsnprintf(self->why, SENTENCE, format, arguments);
    va_end(arguments);
    return false;
}

static bool certificate_damaged(certificate *self) {
    return certificate_wrong(self, CERTIFICATE_FILE " or " REFERENCE_FILE " is damaged.");
}

static void certificate_free(certificate *self) {
    for (size_t i = 0; i < self->count; i++) {
        passage *one = &self->passages[i];
        free(one->tokens);
        free(one->ids);
        free(one->logits);
        free(one->logsumexp);
    }
    json_free(&self->content);
    free(self->reference);
}

/* ---- reference.safetensors -------------------------------------------------------------------- */

/* Copies the array `index`.`name` of `rank` dimensions, whose sizes it writes to `shape`; NULL if
 * there is none of this type that fits. */
static void *read_array(const certificate *self, const json *header, size_t start, size_t index,
                        const char *name, const char *type, size_t width, size_t rank,
                        int64_t shape[2]) {
    char key[64];
    int64_t bounds[2] = {0, 0};
    size_t i = 0, size = width;
    snprintf(key, sizeof key, "%zu.%s", index, name);
    const json_node *entry = json_get(header, header->nodes, key);
    bool object = entry && entry->kind == JSON_OBJECT;
    const json_node *sizes = object ? json_get(header, entry, "shape") : NULL;
    const json_node *offsets = object ? json_get(header, entry, "data_offsets") : NULL;
    bool sound = sizes && offsets && sizes->kind == JSON_LIST && offsets->kind == JSON_LIST &&
                 sizes->size == rank && offsets->size == 2 &&
                 json_is_text(json_get(header, entry, "dtype"), type);
    for (const json_node *n = sound ? json_first(header, sizes) : NULL; n && sound;
         n = json_next(header, n)) {
        sound = json_integer(n, 1, LONGEST_PASSAGE, &shape[i]);
        size *= sound ? (size_t)shape[i++] : 1;
    }
    i = 0;
    for (const json_node *n = sound ? json_first(header, offsets) : NULL; n && sound;
         n = json_next(header, n)) {
        sound = json_integer(n, 0, CERTIFICATE_BYTES, &bounds[i++]);
    }
    sound = sound && bounds[1] >= bounds[0] && (size_t)(bounds[1] - bounds[0]) == size &&
            start + (size_t)bounds[1] <= self->reference_size;
    void *out = sound ? malloc(size) : NULL;
    if (out) memcpy(out, self->reference + start + (size_t)bounds[0], size);
    return out;
}

static bool passage_sound(const passage *one, int64_t vocab_size) {
    if (!one->prompt || one->prompt >= one->count) return false;
    for (size_t i = 0; i < one->count; i++) {
        if (one->tokens[i] < 0 || one->tokens[i] >= vocab_size) return false;
        if (!isfinite(one->logsumexp[i])) return false;
    }
    for (size_t i = 0; i < one->count * one->kept; i++) {
        if (one->ids[i] < 0 || one->ids[i] >= vocab_size || !isfinite(one->logits[i])) return false;
    }
    return true;
}

static bool read_passage(certificate *self, const json *header, size_t start,
                         const json_node *entry, int64_t vocab_size) {
    size_t index = self->count;
    passage *one = &self->passages[self->count++];
    const json *content = &self->content;
    bool object = entry->kind == JSON_OBJECT;
    const json_node *prompt = object ? json_get(content, entry, "prompt") : NULL;
    const json_node *text = object ? json_get(content, entry, "text") : NULL;
    int64_t length[2] = {0}, ids[2] = {0}, logits[2] = {0}, sums[2] = {0}, number;
    one->tokens = read_array(self, header, start, index, "ids", "I32", 4, 1, length);
    one->ids = read_array(self, header, start, index, "package.ids", "I32", 4, 2, ids);
    one->logits = read_array(self, header, start, index, "package.logits", "F32", 4, 2, logits);
    one->logsumexp =
        read_array(self, header, start, index, "package.logsumexp", "F64", 8, 1, sums);
    bool sound = one->tokens && one->ids && one->logits && one->logsumexp && prompt &&
                 json_integer(prompt, 1, LONGEST_PASSAGE, &number) && ids[0] == length[0] &&
                 logits[0] == ids[0] && logits[1] == ids[1] && sums[0] == length[0];
    if (!sound) return certificate_damaged(self);
    one->count = (size_t)length[0];
    one->kept = (size_t)ids[1];
    one->prompt = (size_t)number;
    if (text && text->kind == JSON_TEXT && text->length) {
        one->text = text->text;
        one->text_length = text->length;
    }
    return passage_sound(one, vocab_size) || certificate_damaged(self);
}

static bool read_passages(certificate *self, int64_t vocab_size) {
    const json *content = &self->content;
    const json_node *list = json_get(content, content->nodes, "passages");
    uint64_t size = 0;
    json header;
    if (!list || list->kind != JSON_LIST || !list->size || list->size > PASSAGES ||
        self->reference_size < 8) return certificate_damaged(self);
    for (int i = 7; i >= 0; i--) size = size << 8 | (unsigned char)self->reference[i];
    if (size > self->reference_size - 8) return certificate_damaged(self);
    bool sound = json_parse(&header, self->reference + 8, (size_t)size) &&
                 header.nodes->kind == JSON_OBJECT;
    if (!sound) certificate_damaged(self);
    for (const json_node *i = sound ? json_first(content, list) : NULL; i && sound;
         i = json_next(content, i)) {
        sound = read_passage(self, &header, 8 + (size_t)size, i, vocab_size);
    }
    json_free(&header);
    return sound;
}

/* ---- certificate.json ------------------------------------------------------------------------- */

/* Whether the certificate covers these files of the manifest, and with the same hashes. */
static bool covers(certificate *self, const sums *manifest) {
    static const char *const covered[] = {"model.onnx", "model.onnx.data", "tokenizer.json",
                                          "genai_config.json"};
    const json_node *files = json_get(&self->content, self->content.nodes, "files");
    if (!files || files->kind != JSON_OBJECT) return certificate_damaged(self);
    for (size_t i = 0; i < sizeof covered / sizeof *covered; i++) {
        if (sums_have(manifest, covered[i]) && !json_get(&self->content, files, covered[i])) {
            return certificate_wrong(self, CERTIFICATE_FILE " is damaged: it does not cover %s.",
                                     covered[i]);
        }
    }
    for (const json_node *i = json_first(&self->content, files); i;
         i = json_next(&self->content, i)) {
        const char *hash = sums_hash(manifest, i->key);
        if (!hash || !json_is_text(i, hash)) {
            return certificate_wrong(self, "%.200s is not the file that the certificate was made "
                                           "for.", i->key);
        }
    }
    return true;
}

/* Reads the certificate of `package`, whose manifest is given too. On failure, `self->why` is a
 * sentence. Call certificate_free() in either case. */
static bool certificate_read(certificate *self, const char *package, const sums *manifest,
                             const char *precision) {
    size_t length;
    char hex[65];
    int64_t number, vocab_size;
    char *text = read_file(package, CERTIFICATE_FILE, CERTIFICATE_BYTES, &length);
    if (!text) {
        return certificate_wrong(self, "%.900s has no certificate that can be read: make one with "
                                       "`llama-onnx validate --certify`.", package);
    }
    bool sound = json_parse(&self->content, text, length) &&
                 self->content.nodes->kind == JSON_OBJECT;
    free(text);
    if (!sound) return certificate_damaged(self);
    const json *content = &self->content;
    const json_node *root = content->nodes, *format = json_get(content, root, "format_version");
    const json_node *kind = json_get(content, root, "precision");
    const json_node *activations = json_get(content, root, "activations");
    const json_node *size = json_get(content, root, "vocab_size");
    const json_node *reference = json_get(content, root, "reference");
    bool object = reference && reference->kind == JSON_OBJECT;
    if (!format || !json_integer(format, 1, CERTIFICATE_FORMAT, &number)) {
        return certificate_wrong(self, CERTIFICATE_FILE " is of another format than %d: use a newer "
                                       "bundle.", CERTIFICATE_FORMAT);
    }
    if (!kind || kind->kind != JSON_TEXT || !activations || activations->kind != JSON_TEXT ||
        !size || !json_integer(size, 1, 1 << 24, &vocab_size)) return certificate_damaged(self);
    if (strcmp(kind->text, precision)) {
        return certificate_wrong(self, CERTIFICATE_FILE " is for %.20s, but the package is %.20s.",
                                 kind->text, precision);
    }
    self->precision = kind->text;
    self->activations = activations->text;
    self->reference = read_file(package, REFERENCE_FILE, CERTIFICATE_BYTES, &self->reference_size);
    sound = self->reference && hash_file(package, REFERENCE_FILE, hex) && object &&
            json_is_text(json_get(content, reference, "sha256"), hex);
    if (!sound) {
        return certificate_wrong(self, REFERENCE_FILE " is missing, or is not the file that the "
                                       "certificate lists.");
    }
    return covers(self, manifest) && read_passages(self, vocab_size);
}

/* ---- figures ---------------------------------------------------------------------------------- */

typedef struct figures {
    double max_abs, squares, reference_squares, kl;
    size_t positions;
} figures;

static double logsumexp(const float *logits, size_t count, const bool *left_out) {
    double largest = -INFINITY, sum = 0;
    for (size_t i = 0; i < count; i++) {
        if (!(left_out && left_out[i]) && logits[i] > largest) largest = logits[i];
    }
    for (size_t i = 0; i < count; i++) {
        if (!(left_out && left_out[i])) sum += exp((double)logits[i] - largest);
    }
    return log(sum) + largest;
}

/* Adds what the logits at a position differ by. The divergence is a lower bound: of the reference,
 * only the largest logits are known. `mask` has a place for each token, all false. */
static void figures_add(figures *to, const passage *of, size_t position, const float *logits,
                        size_t vocab_size, bool *mask) {
    const int32_t *ids = of->ids + position * of->kept;
    const float *kept = of->logits + position * of->kept;
    double total = logsumexp(logits, vocab_size, NULL), head = 0, mass = 1;
    for (size_t i = 0; i < of->kept; i++) {
        double difference = fabs((double)logits[ids[i]] - kept[i]);
        double p = kept[i] - of->logsumexp[position], q = logits[ids[i]] - total;
        /* A NaN must stay: it is never within a limit. */
        if (!(difference <= to->max_abs)) to->max_abs = difference;
        to->squares += difference * difference;
        to->reference_squares += (double)kept[i] * kept[i];
        head += exp(p) * (p - q);
        mass -= exp(p);
        mask[ids[i]] = true;
    }
    if (of->kept < vocab_size) {
        if (mass < 1e-15) mass = 1e-15;
        head += mass * (log(mass) - (logsumexp(logits, vocab_size, mask) - total));
    }
    for (size_t i = 0; i < of->kept; i++) mask[ids[i]] = false;
    to->kl += head;
    to->positions++;
}

/* Whether the likeliest token is another than the one that was written, and not by a near-tie. */
static bool diverges(const passage *of, size_t position, const float *logits, size_t vocab_size,
                     bool *differs) {
    const int32_t *ids = of->ids + position * of->kept;
    const float *kept = of->logits + position * of->kept;
    int32_t best = 0, written = of->tokens[position + 1];
    float of_best = kept[of->kept - 1], of_written = kept[of->kept - 1];
    for (size_t i = 1; i < vocab_size; i++) {
        if (logits[i] > logits[best]) best = (int32_t)i;
    }
    for (size_t i = of->kept; i-- > 0;) {
        if (ids[i] == best) of_best = kept[i];
        if (ids[i] == written) of_written = kept[i];
    }
    *differs = best != written;
    return *differs && !(fabs((double)of_written - of_best) <= NEAR_TIE);
}

static bool applies(const char *mine, const char *its) {
    return strcmp(mine, "every") == 0 || strcmp(mine, its) == 0;
}

/* Whether the limit is on a replay of such a package. */
static bool limit_applies(const struct limit *row, const certificate *of, const char *provider) {
    return applies(row->precision, of->precision) && applies(row->activations, of->activations) &&
           applies(row->provider, provider) && applies(row->quantizer, "rtn") &&
           (strcmp(row->measure, "shipped") == 0 || strcmp(row->measure, "replay") == 0);
}

static const char *row_text(const json *file, const json_node *row, const char *key) {
    const json_node *found = json_get(file, row, key);
    return found && found->kind == JSON_TEXT ? found->text : "every";
}

/* Reads a limit of certificate.json; false for one that is damaged. */
static bool read_limit(const certificate *from, const json_node *row, struct limit *out) {
    const json *file = &from->content;
    const json_node *most = row->kind == JSON_OBJECT ? json_get(file, row, "limit") : NULL;
    if (!most || most->kind != JSON_NUMBER) return false;
    *out = (struct limit){row_text(file, row, "precision"), row_text(file, row, "activations"),
                          row_text(file, row, "provider"), row_text(file, row, "quantizer"),
                          row_text(file, row, "measure"), row_text(file, row, "metric"),
                          json_double(most)};
    return true;
}

#endif
