/* `llama_onnx_verify`: the files of a package, and what it computes, against its certificate. */
#ifndef LLAMA_ONNX_VERIFYING_H
#define LLAMA_ONNX_VERIFYING_H

#include "certificate.h"
#include "generating.h"

typedef struct replay {
    llama_onnx *model;
    certificate *of;
    bool *mask;
    float *row;      /* of logits in half precision */
    size_t cleanly, divergences;
    llama_onnx_callback report;
    void *user;
    bool checked; /* whether any limit applied */
    char failed[256];
} replay;

static float from_half(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return (float)(half >> 15 ? -value : value);
}

/* Takes the logits of the last step, of positions up to `end`, `count` of them; a graph that
 * computes the last position only has that one. */
static int take_logits(replay *self, OgaGenerator *generator, const passage *of, size_t end,
                       size_t count, figures *to, bool watch) {
    call *call = &self->model->call;
    const api *oga = call->oga;
    const char *what = "the logits could not be read", *given = self->of->activations;
    size_t vocab_size = (size_t)self->model->config.vocab_size, rank = 0;
    int64_t shape[3] = {0};
    int32_t type = 0;
    void *data = NULL;
    OgaTensor *tensor = NULL;
    int status = check(call, oga->OgaGenerator_GetOutput(generator, "logits", &tensor), what);
    if (!status) status = check(call, oga->OgaTensorGetType(tensor, &type), what);
    if (!status) status = check(call, oga->OgaTensorGetShapeRank(tensor, &rank), what);
    if (!status && rank == 3) status = check(call, oga->OgaTensorGetShape(tensor, shape, 3), what);
    if (!status) status = check(call, oga->OgaTensorGetData(tensor, &data), what);
    bool half = type == OGA_FLOAT16, quantized = self->of->precision[0] == 'i';
    bool sized = rank == 3 && shape[0] == 1 && shape[2] == (int64_t)vocab_size &&
                 (shape[1] == 1 || shape[1] == (int64_t)count);
    if (!status && (!sized || (!half && type != OGA_FLOAT32))) {
        status = fail(call, "%s: they have another shape or type.", what);
    }
    /* The kind of activations decides which limits apply, so it must be one that is possible. */
    bool possible = half ? strcmp(given, "fp16") == 0
                         : strcmp(given, "fp32") == 0 || (quantized && strcmp(given, "int8") == 0);
    if (!status && !possible) {
        status = fail(call, CERTIFICATE_FILE " is damaged: the package does not have %.20s "
                            "activations.", given);
    }
    for (size_t i = 0; !status && i < (size_t)shape[1]; i++) {
        const float *logits = (const float *)data + (half ? 0 : i * vocab_size);
        for (size_t k = 0; half && k < vocab_size; k++) {
            self->row[k] = from_half(((const uint16_t *)data)[i * vocab_size + k]);
        }
        size_t position = end - (size_t)shape[1] + i;
        figures_add(to, of, position, half ? self->row : logits, vocab_size, self->mask);
        bool differs = false;
        if (watch && position + 1 >= of->prompt && position + 1 < of->count && self->cleanly) {
            self->divergences += diverges(of, position, half ? self->row : logits, vocab_size,
                                          &differs);
            if (differs) self->cleanly = 0; /* only the first difference of a passage counts */
        }
    }
    if (tensor) oga->OgaDestroyTensor(tensor);
    return status;
}

/* Feeds a passage in steps that end at `ends`, after going back to `back` at the step that follows
 * its whole, if that is not 0. */
static int feed(replay *self, const passage *of, const size_t *ends, size_t steps, size_t back,
                figures *to, bool watch) {
    llama_onnx *model = self->model;
    const api *oga = &model->oga;
    call *call = &model->call;
    OgaGeneratorParams *params = NULL;
    OgaGenerator *generator = NULL;
    size_t at = 0;
    int status = check(call, oga->OgaCreateGeneratorParams(model->model, &params), model->package);
    if (!status) {
        status = check(call, oga->OgaGeneratorParamsSetSearchNumber(params, "max_length",
                                                                    (double)of->count),
                       model->package);
    }
    if (!status) {
        status = check(call, oga->OgaCreateGenerator(model->model, params, &generator),
                       model->package);
    }
    self->cleanly = 1;
    for (size_t i = 0; i < steps && !status; i++) {
        if (at == of->count && back) {
            status = check(call, oga->OgaGenerator_RewindTo(generator, back),
                           "the replay could not be rewound");
            at = back;
        }
        if (!status) {
            status = check(call, oga->OgaGenerator_AppendTokens(generator, of->tokens + at,
                                                                ends[i] - at),
                           "the package does not run");
        }
        if (!status) {
            status = take_logits(self, generator, of, ends[i], ends[i] - at, to, watch);
        }
        at = ends[i];
    }
    if (generator) oga->OgaDestroyGenerator(generator);
    if (params) oga->OgaDestroyGeneratorParams(params);
    return status;
}

/* Compares a value with a limit, and reports it. */
static void compare(replay *self, const struct limit *row, const char *situation, double value) {
    char line[256];
    bool holds = value <= row->most; /* not for NaN */
    snprintf(line, sizeof line, "%s%s%s: %.3g, at most %.3g%s", situation, *situation ? ", " : "",
             row->metric, value, row->most, holds ? "" : ": too much");
    if (!holds && !*self->failed) snprintf(self->failed, sizeof self->failed, "%.200s", line);
    if (self->report) self->report(line, self->user);
    self->checked = self->checked || strcmp(row->measure, "shipped") == 0;
}

/* Compares what was measured in a situation with one limit; false if it is not measured here. */
static bool compare_figures(replay *self, const struct limit *row, const char *situation,
                            const figures *of) {
    if (strcmp(row->measure, "replay") == 0) {
        if (strcmp(row->metric, "divergences")) return false;
        if (strcmp(situation, "token by token") == 0) {
            compare(self, row, "", (double)self->divergences);
        }
    } else if (strcmp(row->metric, "max_abs") == 0) {
        compare(self, row, situation, of->max_abs);
    } else if (strcmp(row->metric, "relative_l2") == 0) {
        compare(self, row, situation, sqrt(of->squares / of->reference_squares));
    } else if (strcmp(row->metric, "mean_kl") == 0) {
        compare(self, row, situation, of->kl / (double)of->positions);
    } else {
        return false;
    }
    return true;
}

static int compare_all(replay *self, const char *situation, const figures *of) {
    call *call = &self->model->call;
    const char *provider = strcmp(self->model->provider, "CPU") ? "directml" : "cpu";
    const json *file = &self->of->content;
    const json_node *list = json_get(file, file->nodes, "thresholds");
    struct limit row;
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        if (limit_applies(&limits[i], self->of, provider)) {
            compare_figures(self, &limits[i], situation, of);
        }
    }
    if (!list || list->kind != JSON_LIST) {
        return fail(call, CERTIFICATE_FILE " is damaged: it has no thresholds.");
    }
    for (const json_node *i = json_first(file, list); i; i = json_next(file, i)) {
        if (!read_limit(self->of, i, &row)) {
            return fail(call, CERTIFICATE_FILE " is damaged: a threshold has no limit.");
        }
        if (limit_applies(&row, self->of, provider) &&
            !compare_figures(self, &row, situation, of)) {
            return fail(call, "the certificate limits %.40s, which is not measured here: use "
                              "`llama-onnx verify`.", row.metric);
        }
    }
    return LLAMA_ONNX_OK;
}

/* In one pass, token by token, and after going back: as an app feeds the model. */
static int replay_all(replay *self) {
    const certificate *of = self->of;
    size_t *ends = malloc((LONGEST_PASSAGE + 1) * sizeof *ends), longest = 0;
    figures whole = {0}, single = {0}, again = {0};
    int status = ends ? LLAMA_ONNX_OK : out_of_memory(&self->model->call);
    for (size_t i = 0; i < of->count && !status; i++) {
        const passage *one = &of->passages[i];
        size_t steps = one->count - one->prompt + 1;
        if (one->count > of->passages[longest].count) longest = i;
        ends[0] = one->count;
        status = feed(self, one, ends, 1, 0, &whole, false);
        for (size_t k = 0; k < steps && !status; k++) ends[k] = one->prompt + k;
        if (!status) status = feed(self, one, ends, steps, 0, &single, true);
    }
    if (!status && strcmp(self->model->provider, "CPU") == 0) {
        const passage *one = &of->passages[longest];
        ends[0] = ends[1] = one->count;
        status = feed(self, one, ends, 2, one->count / 2, &again, false);
    }
    if (!status) status = compare_all(self, "one pass", &whole);
    if (!status) status = compare_all(self, "token by token", &single);
    if (!status && again.positions) status = compare_all(self, "rewound and continued", &again);
    free(ends);
    return status;
}

/* Whether our tokenizer still gives the certificate's passages. */
static int check_tokens(llama_onnx *self, const certificate *of) {
    for (size_t i = 0; i < of->count && self->words; i++) {
        const passage *one = &of->passages[i];
        ids found = {0};
        if (!one->text) continue;
        bool encoded = tokenizer_encode(self->words, one->text, one->text_length, true, &found);
        bool same = encoded && found.count >= one->prompt &&
                    memcmp(found.all, one->tokens, one->prompt * sizeof *found.all) == 0;
        free(found.all);
        if (!encoded) return out_of_memory(&self->call);
        if (!same) {
            return fail(&self->call, "%s encodes a text of its certificate to other tokens.",
                        self->package);
        }
    }
    return LLAMA_ONNX_OK;
}

static int replay_certificate(llama_onnx *self, certificate *of, llama_onnx_callback report,
                              void *user) {
    replay run = {.model = self, .of = of, .report = report, .user = user};
    size_t vocab_size = (size_t)self->config.vocab_size;
    const json_node *size = json_get(&of->content, of->content.nodes, "vocab_size");
    int64_t number;
    if (!json_integer(size, (int64_t)vocab_size, (int64_t)vocab_size, &number)) {
        return fail(&self->call, CERTIFICATE_FILE " is for another vocabulary.");
    }
    run.mask = calloc(vocab_size, sizeof *run.mask);
    run.row = malloc(vocab_size * sizeof *run.row);
    int status = run.mask && run.row ? check_tokens(self, of) : out_of_memory(&self->call);
    if (!status) status = replay_all(&run);
    if (!status && *run.failed) {
        status = fail(&self->call, "%s does not compute what its certificate says: %s.",
                      self->package, run.failed);
    }
    if (!status && !run.checked) {
        status = fail(&self->call, "the certificate has no threshold for %.20s with %.20s "
                                   "activations.", of->precision, of->activations);
    }
    free(run.mask);
    free(run.row);
    return status;
}

/* Reads the list of files in manifest.json and the package's precision. */
static bool manifest_read(const char *package, sums *list, char precision[16],
                          char why[SENTENCE]) {
    size_t length;
    json content;
    *list = (sums){.index = "manifest.json"};
    char *text = read_file(package, "manifest.json", 1 << 24, &length);
    bool sound = text && json_parse(&content, text, length) &&
                 content.nodes->kind == JSON_OBJECT;
    const json_node *files = sound ? json_get(&content, content.nodes, "files") : NULL;
    const json_node *kind = sound ? json_get(&content, content.nodes, "precision") : NULL;
    sound = files && files->kind == JSON_OBJECT && files->size && kind && kind->kind == JSON_TEXT;
    if (sound) snprintf(precision, 16, "%s", kind->text);
    list->lines = sound ? malloc(files->size * sizeof *list->lines) : NULL;
    list->text = sound ? malloc(length + 66 * files->size) : NULL; /* names and hashes */
    char *to = list->text;
    sound = sound && list->lines && list->text;
    for (const json_node *i = sound ? json_first(&content, files) : NULL; i && sound;
         i = json_next(&content, i)) {
        const json_node *hash = i->kind == JSON_OBJECT ? json_get(&content, i, "sha256") : NULL;
        sound = hash && hash->kind == JSON_TEXT && hash->length == 64 && is_plain_name(i->key);
        if (!sound) break;
        list->lines[list->count++] = (struct sum){to, to + 65};
        memcpy(to, hash->text, 65);
        strcpy(to + 65, i->key);
        to += 65 + strlen(i->key) + 1;
    }
    if (text) json_free(&content);
    free(text);
    if (!sound) say(why, "%.900s is damaged: manifest.json has no list of files.", package);
    if (sound) qsort(list->lines, list->count, sizeof *list->lines, compare_sums);
    return sound;
}

#endif
