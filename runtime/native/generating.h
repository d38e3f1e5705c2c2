/* Answers of a model: one at a time, tokens in and tokens or text out. */
#ifndef LLAMA_ONNX_GENERATING_H
#define LLAMA_ONNX_GENERATING_H

#include "model.h"

/* ---- calls: one at a time, and cancelled from any thread -------------------------------------- */

static void call_init(call *self, const api *oga) {
    mutex_init(&self->lock);
    self->oga = oga;
}

/* Returns whether the caller may generate now; if so, it must call call_end() afterwards. */
static bool call_begin(call *self) {
    mutex_lock(&self->lock);
    bool free = !self->busy;
    if (free) {
        self->busy = true;
        self->cancelled = self->terminated = false;
        self->error[0] = 0;
    }
    mutex_unlock(&self->lock);
    return free;
}

static int call_end(call *self, int status) {
    mutex_lock(&self->lock);
    if (status != LLAMA_ONNX_FAILED) self->error[0] = 0; /* a cancelled computation reports one */
    self->busy = false; /* the next call may begin, and fail, in another thread */
    mutex_unlock(&self->lock);
    return status;
}

static void call_cancel(call *self) {
    mutex_lock(&self->lock);
    if (self->busy) self->cancelled = true;
    if (self->generator) {
        OgaResult *result =
            self->oga->OgaGenerator_SetRuntimeOption(self->generator, "terminate_session", "1");
        if (result) self->oga->OgaDestroyResult(result); /* generation then stops after this token */
        self->terminated = true;
    }
    mutex_unlock(&self->lock);
}

static bool is_cancelled(call *self) {
    mutex_lock(&self->lock);
    bool cancelled = self->cancelled;
    mutex_unlock(&self->lock);
    return cancelled;
}

/* Holds the lock: after call_cancel() has terminated the generator, IsDone throws a C++ exception,
 * which C cannot catch. */
static bool is_over(call *self, OgaGenerator *generator) {
    mutex_lock(&self->lock);
    bool over = self->cancelled || self->oga->OgaGenerator_IsDone(generator);
    mutex_unlock(&self->lock);
    return over;
}

/* The generator that call_cancel() may terminate. */
static void set_generator(call *self, OgaGenerator *generator) {
    mutex_lock(&self->lock);
    self->generator = generator;
    mutex_unlock(&self->lock);
}

/* ---- texts and tokens ------------------------------------------------------------------------- */

static int encode_by_engine(llama_onnx *self, call *call, const char *text, bool around, ids *out) {
    const api *oga = &self->oga;
    const char *keys[] = {"add_special_tokens"}, *values[] = {around ? "true" : "false"};
    const char *what = "the text could not be tokenized";
    OgaSequences *tokens = NULL;
    mutex_lock(&self->engine);
    int status = check(call, oga->OgaCreateSequences(&tokens), what);
    if (!status) {
        status = check(call, oga->OgaUpdateTokenizerOptions(self->tokenizer, keys, values, 1),
                       "the tokenizer rejected its options");
    }
    if (!status) status = check(call, oga->OgaTokenizerEncode(self->tokenizer, text, tokens), what);
    size_t count = status ? 0 : oga->OgaSequencesGetSequenceCount(tokens, 0);
    for (size_t i = 0; i < count; i++) ids_add(out, oga->OgaSequencesGetSequenceData(tokens, 0)[i]);
    if (tokens) oga->OgaDestroySequences(tokens);
    mutex_unlock(&self->engine);
    return !status && out->full ? out_of_memory(call) : status;
}

/* Adds the tokens of a text; with `around`, those that the vocabulary puts around one too, unless it
 * has the first of them already. */
static int encode(llama_onnx *self, call *call, const char *text, size_t length, bool around,
                  ids *out) {
    if (!is_utf8(text, length)) return fail(call, "the text is not UTF-8.");
    if (length > MOST_BYTES) return fail(call, "the text has more than %d bytes.", MOST_BYTES);
    if (!self->words && memchr(text, 0, length)) {
        return fail(call, "the text has a NUL in it, which this package's tokenizer cannot read.");
    }
    if (!self->words) return encode_by_engine(self, call, text, around, out);
    size_t before = out->count;
    bool sound = tokenizer_encode(self->words, text, length, false, out);
    bool has_first = out->count > before && out->all[before] == self->config.bos;
    if (sound && around && !has_first) {
        out->count = before;
        sound = tokenizer_encode(self->words, text, length, true, out);
    }
    return sound ? LLAMA_ONNX_OK : out_of_memory(call);
}

/* Turns the tokens of an answer into text. */
typedef struct text_stream {
    decoder own;
    buffer piece;
    OgaTokenizerStream *engine; /* NULL if our own tokenizer is used */
} text_stream;

/* `answer`: a new text begins, so the space that SentencePiece puts before its first word is left
 * out; otherwise a text goes on. */
static int stream_open(llama_onnx *self, call *call, text_stream *stream, bool answer) {
    const char *nothing;
    *stream = (text_stream){.own = {.words = self->words}};
    if (self->words) {
        stream->own.strip = answer && self->words->strips;
        return LLAMA_ONNX_OK;
    }
    int status = check(call, self->oga.OgaCreateTokenizerStream(self->tokenizer, &stream->engine),
                       "decoding could not be started");
    /* After a special token onnxruntime-genai drops the space. */
    if (status || !answer || !self->config.end_count) return status;
    return check(call, self->oga.OgaTokenizerStreamDecode(stream->engine, self->config.ends[0],
                                                          &nothing),
                 "the answer could not be started");
}

static void stream_close(llama_onnx *self, text_stream *stream) {
    if (stream->engine) self->oga.OgaDestroyTokenizerStream(stream->engine);
    free(stream->piece.text);
}

/* A text of C cannot have a NUL: some tokens are one. */
static void remove_nuls(buffer *text) {
    size_t kept = 0;
    for (size_t i = 0; i < text->size; i++) {
        if (text->text[i]) text->text[kept++] = text->text[i];
    }
    if (text->text) text->text[kept] = 0;
    text->size = kept;
}

/* `*piece` is what the token adds, and empty until a character is complete. */
static int stream_put(llama_onnx *self, call *call, text_stream *stream, int32_t id,
                      const char **piece) {
    if (!self->words) {
        return check(call, self->oga.OgaTokenizerStreamDecode(stream->engine, id, piece),
                     "a token could not be decoded");
    }
    stream->piece.size = 0;
    put(&stream->piece, "");
    decoder_put(&stream->own, id, &stream->piece);
    remove_nuls(&stream->piece);
    *piece = stream->piece.text;
    return stream->piece.full ? out_of_memory(call) : LLAMA_ONNX_OK;
}

/* Formats a conversation with the model's chat template, after checking that the template cannot
 * keep onnxruntime-genai's engine busy for ever. */
static int apply_template(llama_onnx *self, call *call, const char *messages, const char **prompt) {
    buffer checked = {0};
    weights weights;
    char why[WHY];
    int status = LLAMA_ONNX_OK;
    if (!self->chat_template) {
        status = fail(call, "%s", self->no_chat);
    } else if (!read_messages(messages, &checked, &weights, why)) {
        status = fail(call, "%s", why);
    } else if (!template_check(self->chat_template, strlen(self->chat_template), weights, why)) {
        status = fail(call, "the model's chat template %s.", why);
    } else {
        mutex_lock(&self->engine);
        status = check(call,
                       self->oga.OgaTokenizerApplyChatTemplate(
                           self->tokenizer, self->chat_template, checked.text, NULL, true, prompt),
                       "the model's chat template rejected the messages");
        mutex_unlock(&self->engine);
    }
    free(checked.text);
    return status;
}

static int check_ids(llama_onnx *self, call *call, const int32_t *ids, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= self->config.vocab_size) {
            return fail(call, "the prompt has the token %ld, but the model has tokens 0 to %d only.",
                        (long)ids[i], self->config.vocab_size - 1);
        }
    }
    return LLAMA_ONNX_OK;
}

/* ---- one answer, sampled by onnxruntime-genai ------------------------------------------------- */

typedef struct sink { /* receives new tokens: in `ids`, or as text through `callback` */
    int32_t *ids;
    size_t room, count;
    text_stream *stream;
    llama_onnx_callback callback;
    void *user;
} sink;

static int deliver(llama_onnx *self, sink *to, int32_t id) {
    const char *piece = "";
    if (to->ids) to->ids[to->count] = id;
    to->count++;
    if (!to->stream) return LLAMA_ONNX_OK;
    if (stream_put(self, &self->call, to->stream, id, &piece)) return LLAMA_ONNX_FAILED;
    return *piece && to->callback && to->callback(piece, to->user) ? LLAMA_ONNX_CANCELLED
                                                                   : LLAMA_ONNX_OK;
}

/* Lets onnxruntime-genai choose the next token. */
static int next_token(call *self, OgaGenerator *generator, int32_t *id) {
    const int32_t *next = NULL;
    size_t count;
    int status = check(self, self->oga->OgaGenerator_GenerateNextToken(generator),
                       "the next token could not be computed");
    if (!status) {
        status = check(self, self->oga->OgaGenerator_GetNextTokens(generator, &next, &count),
                       "the next token could not be read");
    }
    if (!status) *id = next[0];
    return status;
}

static int run_generator(llama_onnx *self, OgaGenerator *generator, const int32_t *prompt,
                         size_t count, sink *to) {
    int32_t id = 0;
    int status = check(&self->call, self->oga.OgaGenerator_AppendTokens(generator, prompt, count),
                       "the prompt could not be processed");
    while (!status && to->count < to->room && !is_over(&self->call, generator)) {
        status = next_token(&self->call, generator, &id);
        if (!status) status = deliver(self, to, id);
    }
    /* Checked before the status, because a terminated computation reports an error. */
    return is_cancelled(&self->call) ? LLAMA_ONNX_CANCELLED : status;
}

static int generate(llama_onnx *self, const int32_t *prompt, size_t count, sink *to) {
    const api *oga = &self->oga;
    call *call = &self->call;
    OgaGeneratorParams *params = NULL;
    OgaGenerator *generator = NULL;
    size_t context = (size_t)self->config.context_length;
    if (!count) return fail(call, "the prompt is empty.");
    if (check_ids(self, call, prompt, count)) return LLAMA_ONNX_FAILED;
    if (count >= context) {
        return fail(call, "the prompt has %zu tokens, but prompt and answer together may have %zu: "
                          "shorten the prompt.", count, context);
    }
    if (to->room > context - count) to->room = context - count;
    int status = check(call, oga->OgaCreateGeneratorParams(self->model, &params), self->package);
    if (!status) {
        /* The cache is sized for this prompt and answer, not for the model's whole context. */
        status = check(call, oga->OgaGeneratorParamsSetSearchNumber(params, "max_length",
                                                                    (double)(count + to->room)),
                       self->package);
    }
    if (!status) {
        status = check(call, oga->OgaCreateGenerator(self->model, params, &generator),
                       self->package);
    }
    if (!status) {
        set_generator(call, generator);
        status = run_generator(self, generator, prompt, count, to);
        set_generator(call, NULL);
    }
    if (generator) oga->OgaDestroyGenerator(generator);
    if (params) oga->OgaDestroyGeneratorParams(params);
    return status;
}

static int generate_text(llama_onnx *self, const char *prompt, bool chat, int max_new_tokens,
                         llama_onnx_callback callback, void *user) {
    ids tokens = {0};
    text_stream stream;
    sink to = {.room = (size_t)max_new_tokens, .stream = &stream, .callback = callback,
               .user = user};
    int status = stream_open(self, &self->call, &stream, chat);
    /* A chat template adds the special tokens itself, the start token included. */
    if (!status) status = encode(self, &self->call, prompt, strlen(prompt), !chat, &tokens);
    if (!status) status = generate(self, tokens.all, tokens.count, &to);
    stream_close(self, &stream);
    free(tokens.all);
    return status;
}

#endif
