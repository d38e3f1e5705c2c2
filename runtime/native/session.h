/* Sessions: texts that grow, of which the model keeps what it computed. See llama_onnx.h. */
#ifndef LLAMA_ONNX_SESSION_H
#define LLAMA_ONNX_SESSION_H

#include "generating.h"
#include "sampling.h"
#include "stops.h"

enum {
    SESSION_TOKENS = 4096, /* by default */
    SESSION_CHUNK = 512,   /* tokens read at once, between which an answer can be cancelled */
    SESSION_BYTES = 1 << 28,
    SESSION_FORMAT = 1,
    GUIDE_BYTES = 1 << 16
};

struct llama_onnx_session {
    llama_onnx *model;
    call call;
    char *adapter; /* NULL for none */
    size_t max_tokens;
    ids tokens;
    OgaGenerator *generator; /* NULL until the first answer */
    size_t held;             /* tokens that the generator has */
    size_t cached;           /* of those, the first so many are the session's */
    buffer messages;         /* a JSON list without its brackets */
    struct message_end {
        size_t bytes, tokens; /* the sizes of `messages` and `tokens` after a message */
        bool answer;          /* that the session generated */
    } *ends;
    size_t message_count, message_room;
    bool has_text; /* besides messages */
    llama_onnx_stats stats;
};

static void drop_generator(llama_onnx_session *self) {
    if (self->generator) self->model->oga.OgaDestroyGenerator(self->generator);
    self->generator = NULL;
    self->held = self->cached = 0;
}

/* Leaves the first `count` tokens. */
static void keep_tokens(llama_onnx_session *self, size_t count) {
    if (self->tokens.count > count) self->tokens.count = count;
    if (self->cached > count) self->cached = count;
}

static int add_tokens(llama_onnx_session *self, const int32_t *tokens, size_t count) {
    call *call = &self->call;
    if (check_ids(self->model, call, tokens, count)) return LLAMA_ONNX_FAILED;
    if (count > self->max_tokens - self->tokens.count) {
        return fail(call, "the session would have %zu tokens, but may have %zu: rewind it, or open "
                          "it with more max_tokens.", self->tokens.count + count, self->max_tokens);
    }
    size_t before = self->tokens.count;
    for (size_t i = 0; i < count; i++) ids_add(&self->tokens, tokens[i]);
    if (!self->tokens.full) return LLAMA_ONNX_OK;
    self->tokens.count = before;
    self->tokens.full = false;
    return out_of_memory(call);
}

/* ---- messages --------------------------------------------------------------------------------- */

static void keep_messages(llama_onnx_session *self, size_t count) {
    if (self->message_count <= count) return;
    self->message_count = count;
    self->messages.size = count ? self->ends[count - 1].bytes : 0;
    if (self->messages.text) self->messages.text[self->messages.size] = 0;
}

/* Whether the last message is an answer. */
static bool is_answered(const llama_onnx_session *self) {
    return self->message_count && self->ends[self->message_count - 1].answer;
}

/* Adds one message, or several with commas between. */
static int add_messages(llama_onnx_session *self, const char *text, size_t size, bool answer) {
    if (self->message_count == self->message_room) {
        size_t room = self->message_room * 2 + 16;
        struct message_end *grown = realloc(self->ends, room * sizeof *grown);
        if (!grown) return out_of_memory(&self->call);
        self->ends = grown;
        self->message_room = room;
    }
    if (self->messages.size) put(&self->messages, ", ");
    put_bytes(&self->messages, text, size);
    if (self->messages.full) return out_of_memory(&self->call);
    self->ends[self->message_count++] =
        (struct message_end){self->messages.size, self->tokens.count, answer};
    return LLAMA_ONNX_OK;
}

/* Makes the tokens of the session those of its messages. */
static int format_messages(llama_onnx_session *self) {
    llama_onnx *model = self->model;
    call *call = &self->call;
    const char *prompt = NULL;
    buffer all = {0};
    ids found = {0};
    put(&all, "[");
    put(&all, self->messages.text ? self->messages.text : "");
    put(&all, "]");
    int status = all.full ? out_of_memory(call) : apply_template(model, call, all.text, &prompt);
    /* The template writes the special tokens itself, the start token included. */
    if (!status) status = encode(model, call, prompt, strlen(prompt), false, &found);
    if (!status && found.count >= self->max_tokens) {
        status = fail(call, "the conversation has %zu tokens, but may have %zu with its answer: "
                            "rewind it, or open it with more max_tokens.",
                      found.count, self->max_tokens);
    }
    if (!status) status = check_ids(model, call, found.all, found.count);
    if (!status) {
        size_t common = 0;
        while (common < found.count && common < self->tokens.count &&
               found.all[common] == self->tokens.all[common]) common++;
        keep_tokens(self, common);
        status = add_tokens(self, found.all + common, found.count - common);
        /* Where the template changed earlier messages, as one that drops old thoughts, these end
         * nowhere before the end. */
        for (size_t i = 0; !status && i < self->message_count; i++) {
            if (self->ends[i].tokens > common) self->ends[i].tokens = self->tokens.count;
        }
    }
    if (prompt) model->oga.OgaDestroyString(prompt);
    free(found.all);
    free(all.text);
    return status;
}

static int append_messages(llama_onnx_session *self, const char *messages) {
    call *call = &self->call;
    char why[WHY];
    weights weights;
    buffer checked = {0};
    if (self->has_text) {
        return fail(call, "the session has text or tokens that are not of messages: open another "
                          "session for a conversation.");
    }
    size_t before = self->message_count;
    int status = read_messages(messages, &checked, &weights, why) ? LLAMA_ONNX_OK
                                                                  : fail(call, "%s", why);
    /* Without the brackets of the list. */
    if (!status) status = add_messages(self, checked.text + 1, checked.size - 2, false);
    if (!status) status = format_messages(self);
    if (status) {
        keep_messages(self, before);
    } else {
        self->ends[self->message_count - 1].tokens = self->tokens.count;
    }
    free(checked.text);
    return status;
}

/* Adds an answer to the messages, if there are any. */
static int add_answer(llama_onnx_session *self, const buffer *text) {
    buffer message = {0};
    if (!self->message_count) return LLAMA_ONNX_OK;
    put(&message, "{\"role\": \"assistant\", \"content\": ");
    put_text(&message, text->text ? text->text : "", text->size);
    put(&message, "}");
    int status = message.full || text->full ? out_of_memory(&self->call)
                                            : add_messages(self, message.text, message.size, true);
    free(message.text);
    return status;
}

/* ---- the generator ---------------------------------------------------------------------------- */

/* Loads the session's adapter, if it is the first to use it, and activates it. */
static int activate_adapter(llama_onnx_session *self, OgaGenerator *generator) {
    llama_onnx *model = self->model;
    const api *oga = &model->oga;
    call *call = &self->call;
    char file[SENTENCE] = "";
    size_t length;
    json manifest;
    if (!self->adapter) return LLAMA_ONNX_OK;
    char *text = read_file(model->package, "manifest.json", 1 << 24, &length);
    bool sound = text && json_parse(&manifest, text, length);
    const json_node *all = sound ? json_get(&manifest, manifest.nodes, "adapters") : NULL;
    const json_node *one = all ? json_get(&manifest, all, self->adapter) : NULL;
    const json_node *name = one ? json_get(&manifest, one, "file") : NULL;
    bool plain = name && name->kind == JSON_TEXT && is_plain_name(name->text);
    if (plain) snprintf(file, sizeof file, "%s", name->text);
    if (text) json_free(&manifest);
    free(text);
    if (!one) return fail(call, "%s has no adapter '%.100s'.", model->package, self->adapter);
    if (!plain) return fail(call, "%s is damaged: its adapter '%.100s' has no file.",
                            model->package, self->adapter);
    char *path = join(model->package, file);
    if (!path) return out_of_memory(call);
    mutex_lock(&model->engine);
    int status = model->adapters ? LLAMA_ONNX_OK
                                 : check(call, oga->OgaCreateAdapters(model->model,
                                                                      &model->adapters), path);
    OgaResult *unknown = status ? NULL : oga->OgaSetActiveAdapter(generator, model->adapters,
                                                                  self->adapter);
    if (unknown) { /* it is not loaded yet */
        oga->OgaDestroyResult(unknown);
        status = check(call, oga->OgaLoadAdapter(model->adapters, path, self->adapter), path);
        if (!status) {
            status = check(call, oga->OgaSetActiveAdapter(generator, model->adapters,
                                                          self->adapter), path);
        }
    }
    mutex_unlock(&model->engine);
    free(path);
    return status;
}

/* What onnxruntime-genai needs to choose the tokens itself. */
static int set_search(llama_onnx_session *self, OgaGeneratorParams *params,
                      const llama_onnx_sampling *how, uint64_t seed) {
    const api *oga = &self->model->oga;
    const char *what = "the sampling options were rejected";
    const struct {
        const char *name;
        double value;
    } numbers[] = {
        {"temperature", is_greedy(how) ? 1 : how->temperature},
        {"top_k", how->top_k > 0 ? how->top_k : 0},
        {"top_p", how->top_p},
        {"repetition_penalty", how->repetition_penalty},
        {"no_repeat_ngram_size", how->no_repeat_ngram_size},
        {"random_seed", (double)(seed >> 33)},
    };
    int status = check(&self->call, oga->OgaGeneratorParamsSetSearchBool(params, "do_sample",
                                                                         !is_greedy(how)), what);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers && !status; i++) {
        status = check(&self->call, oga->OgaGeneratorParamsSetSearchNumber(
                                        params, numbers[i].name, numbers[i].value), what);
    }
    return status;
}

static int set_guide(llama_onnx_session *self, OgaGeneratorParams *params,
                     const llama_onnx_sampling *how) {
    /* Without a rule for white space, a model may write nothing else until its tokens are used up. */
    static const char rule[] = "{\"x-guidance\": {\"whitespace_flexible\": false, "
                               "\"item_separator\": \", \", \"key_separator\": \": \"}";
    const char *text = how->guide;
    buffer changed = {0};
    if (!text) return LLAMA_ONNX_OK;
    if (strcmp(how->guide_kind, "json_schema") == 0) {
        const char *inside = text + strspn(text, " \t\r\n{"), *brace = strchr(text, '{');
        if (brace && !strstr(text, "x-guidance")) {
            put(&changed, rule);
            if (*inside != '}') put(&changed, ", ");
            put(&changed, brace + 1);
            text = changed.text;
        }
    }
    int status = changed.full ? out_of_memory(&self->call)
                              : check(&self->call, self->model->oga.OgaGeneratorParamsSetGuidance(
                                                       params, how->guide_kind, text, false),
                                      "the guide was rejected");
    free(changed.text);
    return status;
}

/* `how` is NULL for a generator whose tokens we choose. */
static int make_generator(llama_onnx_session *self, const llama_onnx_sampling *how, uint64_t seed,
                          OgaGenerator **out) {
    llama_onnx *model = self->model;
    const api *oga = &model->oga;
    call *call = &self->call;
    OgaGeneratorParams *params = NULL;
    int status = check(call, oga->OgaCreateGeneratorParams(model->model, &params), model->package);
    if (!status) {
        status = check(call, oga->OgaGeneratorParamsSetSearchNumber(params, "max_length",
                                                                    (double)self->max_tokens),
                       model->package);
    }
    if (!status && how) status = set_search(self, params, how, seed);
    if (!status && how) status = set_guide(self, params, how);
    if (!status) {
        status = check(call, oga->OgaCreateGenerator(model->model, params, out),
                       how && how->guide ? "the guide was rejected" : model->package);
    }
    if (params) oga->OgaDestroyGeneratorParams(params);
    if (!status) status = activate_adapter(self, *out);
    return status;
}

/* Reads tokens into a generator, in parts of nearly equal length, between which the answer can be
 * cancelled. `*held` counts them. */
static int read_into(llama_onnx_session *self, OgaGenerator *generator, size_t *held) {
    call *call = &self->call;
    const int32_t *from = self->tokens.all + *held;
    size_t count = self->tokens.count - *held, parts = (count + SESSION_CHUNK - 1) / SESSION_CHUNK;
    int status = LLAMA_ONNX_OK;
    set_generator(call, generator);
    for (size_t i = 0; i < parts && !status && !is_cancelled(call); i++) {
        size_t part = count / parts + (i < count % parts);
        status = check(call, self->model->oga.OgaGenerator_AppendTokens(generator, from, part),
                       "the prompt could not be processed");
        from += part;
        if (!status) *held += part;
    }
    set_generator(call, NULL);
    return is_cancelled(call) ? LLAMA_ONNX_CANCELLED : status;
}

/* Gets the logits after the last token into the session's generator. */
static int prefill(llama_onnx_session *self) {
    const api *oga = &self->model->oga;
    int status = LLAMA_ONNX_OK;
    if (!self->generator) {
        self->held = self->cached = 0;
        status = make_generator(self, NULL, 0, &self->generator);
    }
    /* The last token is read again if all are there: its logits are needed. */
    if (self->cached == self->tokens.count) self->cached--;
    self->stats.cached_tokens = self->cached;
    if (!status && self->held > self->cached) {
        status = check(&self->call, oga->OgaGenerator_RewindTo(self->generator, self->cached),
                       "the session could not be rewound");
        self->held = self->cached;
    }
    if (!status) status = read_into(self, self->generator, &self->held);
    self->cached = self->held;
    if (status == LLAMA_ONNX_FAILED || self->call.terminated) drop_generator(self);
    return status;
}

/* The logits after the last token, as an OgaTensor to destroy. */
static int get_logits(call *call, OgaGenerator *generator, size_t vocab_size, OgaTensor **tensor,
                      const float **logits) {
    const api *oga = call->oga;
    const char *what = "the logits could not be read";
    int64_t shape[8];
    size_t rank = 0;
    int32_t type = 0;
    void *data = NULL;
    int status = check(call, oga->OgaGenerator_GetLogits(generator, tensor), what);
    if (!status) status = check(call, oga->OgaTensorGetType(*tensor, &type), what);
    if (!status) status = check(call, oga->OgaTensorGetShapeRank(*tensor, &rank), what);
    if (!status && (rank < 1 || rank > 8 || type != OGA_FLOAT32)) {
        return fail(call, "%s: they are of another type.", what);
    }
    if (!status) status = check(call, oga->OgaTensorGetShape(*tensor, shape, rank), what);
    if (!status && shape[rank - 1] != (int64_t)vocab_size) {
        return fail(call, "%s: they have another size.", what);
    }
    if (!status) status = check(call, oga->OgaTensorGetData(*tensor, &data), what);
    *logits = data;
    return status;
}

/* ---- answers ---------------------------------------------------------------------------------- */

typedef struct answer {
    const llama_onnx_sampling *how;
    sampler sampler;
    OgaGenerator *guided; /* NULL if we choose the tokens */
    text_stream stream;
    stop_filter stops;
    buffer text;
    llama_onnx_callback callback;
    void *user;
    double started;
} answer;

static bool ends_answer(const llama_onnx *model, int32_t id) {
    for (size_t i = 0; i < model->config.end_count; i++) {
        if (model->config.ends[i] == id) return true;
    }
    return false;
}

/* Hands out text; returns LLAMA_ONNX_CANCELLED if the callback wants no more. */
static int hand_out(answer *self, const char *text, size_t size) {
    if (!size) return LLAMA_ONNX_OK;
    size_t before = self->text.size;
    put_bytes(&self->text, text, size);
    if (self->text.full || !self->callback) return LLAMA_ONNX_OK;
    return self->callback(self->text.text + before, self->user) ? LLAMA_ONNX_CANCELLED
                                                                : LLAMA_ONNX_OK;
}

/* Chooses the next token, and computes what the choice needs. */
static int choose_next(llama_onnx_session *self, answer *to, int32_t *id) {
    const float *logits = NULL;
    OgaTensor *tensor = NULL;
    size_t vocab_size = (size_t)self->model->config.vocab_size;
    if (to->guided) return next_token(&self->call, to->guided, id);
    int status = get_logits(&self->call, self->generator, vocab_size, &tensor, &logits);
    if (!status) {
        *id = choose(&to->sampler, logits, self->tokens.all, self->tokens.count);
        if (*id < 0) status = fail(&self->call, "the model computes values that are not numbers.");
    }
    if (tensor) self->model->oga.OgaDestroyTensor(tensor);
    return status;
}

/* Reads the token that was chosen last into the session's generator. */
static int read_last(llama_onnx_session *self) {
    if (self->held == self->tokens.count) return LLAMA_ONNX_OK;
    int status = check(&self->call,
                       self->model->oga.OgaGenerator_AppendTokens(
                           self->generator, self->tokens.all + self->held,
                           self->tokens.count - self->held),
                       "the next token could not be computed");
    if (!status) self->held = self->cached = self->tokens.count;
    return status;
}

/* One token: 0 to continue, or why the answer ends; `*status` is set then. */
static int answer_step(llama_onnx_session *self, answer *to, int *status) {
    llama_onnx_stats *stats = &self->stats;
    const char *piece = "";
    int32_t id = 0;
    if (stats->generated_tokens && !to->guided) *status = read_last(self);
    if (!*status) *status = choose_next(self, to, &id);
    if (*status) return LLAMA_ONNX_NOT_FINISHED;
    ids_add(&self->tokens, id);
    if (self->tokens.full) *status = out_of_memory(&self->call);
    if (!stats->generated_tokens++) stats->first_token_seconds = now() - to->started;
    if (*status) return LLAMA_ONNX_NOT_FINISHED;
    if (ends_answer(self->model, id)) return LLAMA_ONNX_END;
    *status = stream_put(self->model, &self->call, &to->stream, id, &piece);
    if (*status) return LLAMA_ONNX_NOT_FINISHED;
    size_t shown = stops_feed(&to->stops, piece);
    int handed = hand_out(to, to->stops.shown.text, shown);
    if (to->stops.shown.full || to->text.full) *status = out_of_memory(&self->call);
    if (*status) return LLAMA_ONNX_NOT_FINISHED;
    if (to->stops.found) return LLAMA_ONNX_STOP;
    if (handed || is_cancelled(&self->call)) {
        *status = LLAMA_ONNX_CANCELLED;
        return LLAMA_ONNX_STOPPED;
    }
    bool full = stats->generated_tokens == (size_t)to->how->max_new_tokens ||
                self->tokens.count == self->max_tokens;
    return full ? LLAMA_ONNX_LENGTH : -1;
}

static int run_answer(llama_onnx_session *self, answer *to) {
    llama_onnx_stats *stats = &self->stats;
    size_t held = 0;
    int status = to->guided ? read_into(self, to->guided, &held) : prefill(self);
    stats->prompt_seconds = now() - to->started;
    int finish = status == LLAMA_ONNX_CANCELLED ? LLAMA_ONNX_STOPPED : -1;
    while (!status && finish < 0) finish = answer_step(self, to, &status);
    stats->finish = status == LLAMA_ONNX_FAILED ? LLAMA_ONNX_NOT_FINISHED : finish;
    if (!status && finish != LLAMA_ONNX_STOP) {
        size_t rest = stops_rest(&to->stops);
        if (hand_out(to, to->stops.shown.text, rest)) status = LLAMA_ONNX_CANCELLED;
    }
    stats->answer_seconds = now() - to->started;
    double after = stats->answer_seconds - stats->first_token_seconds;
    if (stats->generated_tokens > 1 && after > 0) {
        stats->tokens_per_second = (double)(stats->generated_tokens - 1) / after;
    }
    return status;
}

static int check_sampling(llama_onnx_session *self, const llama_onnx_sampling *how) {
    call *call = &self->call;
    const char *wrong = sampling_wrong(how);
    if (wrong) return fail(call, "%s", wrong);
    if (how->stop_count && !how->stop) return fail(call, "the list of stop texts is NULL.");
    if (how->stop_count > MOST_STOPS) {
        return fail(call, "there are more than %d stop texts.", MOST_STOPS);
    }
    for (size_t i = 0; i < how->stop_count; i++) {
        const char *stop = how->stop[i];
        if (!stop || !*stop || strlen(stop) > LONGEST_STOP || !is_utf8(stop, strlen(stop))) {
            return fail(call, "stop text %zu is not UTF-8 of 1 to %d bytes.", i, LONGEST_STOP);
        }
    }
    if (!how->guide) return LLAMA_ONNX_OK;
    const char *kind = how->guide_kind ? how->guide_kind : "";
    if (strcmp(kind, "json_schema") && strcmp(kind, "regex") && strcmp(kind, "lark_grammar")) {
        return fail(call, "there is no guide '%.40s': choose json_schema, regex or lark_grammar.",
                    kind);
    }
    if (strlen(how->guide) > GUIDE_BYTES || !is_utf8(how->guide, strlen(how->guide))) {
        return fail(call, "the guide is not UTF-8 of at most %d bytes.", GUIDE_BYTES);
    }
    return LLAMA_ONNX_OK;
}

/* DirectML cannot read tokens after others: there, as with a guide, onnxruntime-genai chooses. */
static bool by_engine(const llama_onnx_session *self, const llama_onnx_sampling *how) {
    return how->guide || strcmp(self->model->provider, "CPU") != 0;
}

static int answer_open(llama_onnx_session *self, answer *to) {
    const llama_onnx_sampling *how = to->how;
    call *call = &self->call;
    uint64_t clock = (uint64_t)(now() * 1e9) ^ (uint64_t)(uintptr_t)to, seed = (uint64_t)how->seed;
    if (how->seed < 0) seed = random_bits(&clock);
    if (by_engine(self, how) && how->min_p > 0) {
        return fail(call, "min_p cannot be used %s.", how->guide ? "with a guide" : "on DirectML");
    }
    if (by_engine(self, how)) {
        uint64_t state = seed;
        int status = make_generator(self, how, random_bits(&state), &to->guided);
        if (status) return status;
    } else if (!sampler_init(&to->sampler, how, (size_t)self->model->config.vocab_size, seed,
                             self->tokens.all, self->tokens.count)) {
        return out_of_memory(call);
    }
    stops_init(&to->stops, how->stop, how->stop_count);
    return stream_open(self->model, call, &to->stream, self->message_count > 0);
}

static int answer_session(llama_onnx_session *self, const llama_onnx_sampling *how,
                          llama_onnx_callback callback, void *user) {
    call *call = &self->call;
    answer to = {.how = how, .callback = callback, .user = user, .started = now()};
    self->stats = (llama_onnx_stats){.prompt_tokens = self->tokens.count};
    if (check_sampling(self, how)) return LLAMA_ONNX_FAILED;
    if (!self->tokens.count) return fail(call, "the session is empty: append something first.");
    if (is_answered(self)) return fail(call, "the conversation ends with an answer: append a message.");
    if (self->tokens.count == self->max_tokens) {
        return fail(call, "the session has %zu tokens, and may have no more: rewind it, or open it "
                          "with more max_tokens.", self->max_tokens);
    }
    int status = answer_open(self, &to);
    if (!status) status = run_answer(self, &to);
    if (status == LLAMA_ONNX_FAILED) {
        keep_tokens(self, self->stats.prompt_tokens);
        drop_generator(self); /* nobody knows what it has */
    } else if (self->stats.generated_tokens) {
        int added = add_answer(self, &to.text);
        if (added) status = added;
    }
    if (to.guided) self->model->oga.OgaDestroyGenerator(to.guided);
    stream_close(self->model, &to.stream);
    sampler_free(&to.sampler);
    stops_free(&to.stops);
    free(to.text.text);
    return status;
}

static void session_free(llama_onnx_session *self) {
    drop_generator(self);
    mutex_destroy(&self->call.lock);
    free(self->tokens.all);
    free(self->messages.text);
    free(self->ends);
    free(self->adapter);
    free(self);
}

#endif
