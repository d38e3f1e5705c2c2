/* See llama_onnx.h. C11 without further libraries; builds with MSVC, MinGW and gcc. */
#ifdef _WIN32
#define _CRT_SECURE_NO_WARNINGS
#else
#define _GNU_SOURCE
#endif

#include "llama_onnx.h"
#include "config.h"
#include "files.h"
#include "genai.h"
#include "graph.h"
#include "json.h"
#include "messages.h"
#include "system.h"
#include "template.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* genai's name of the provider that is tried first, if find_device() finds a device for it. */
#ifndef ACCELERATOR
#define ACCELERATOR "DML"
#endif

/* The text file in each set of libraries that contains the version of its ONNX Runtime. */
#define VERSION_FILE "onnxruntime.version"

/* ---- an opened package ------------------------------------------------------------------------ */

struct llama_onnx {
    api oga;
    module ort, genai, directml;
    OgaModel *model;
    OgaTokenizer *tokenizer;
    char *package; /* full path */
    int context_length, vocab_size;
    char *chat_template; /* NULL if there is none, or none that can be used: `no_chat` */
    char no_chat[WHY];
    const char *provider;
    char reason[1024];
    char error[2048];
    mutex lock; /* guards the next three, which llama_onnx_cancel() uses from other threads */
    OgaGenerator *generator;
    bool busy, cancelled;
};

/* Replaces what is not UTF-8, such as half a character at the end of a text that was cut, and what
 * a terminal could obey: messages quote names and values from packages. */
static void make_printable(char *text) {
    for (size_t left = strlen(text), size; left; text += size, left -= size) {
        size = utf8_size((const unsigned char *)text, left);
        bool shown = size && is_shown(text, size);
        if (!size) size = 1;
        if (!shown) memset(text, '?', size);
    }
}

static int fail(llama_onnx *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(self->error, sizeof self->error, format, arguments);
    va_end(arguments);
    make_printable(self->error);
    return LLAMA_ONNX_FAILED;
}

static int out_of_memory(llama_onnx *self) { return fail(self, "there is not enough memory."); }

/* On failure, the error is `what` and the first line of genai's message. */
static int check(llama_onnx *self, OgaResult *result, const char *what) {
    if (!result) return LLAMA_ONNX_OK;
    const char *text = self->oga.OgaResultGetError(result);
    int length = (int)strcspn(text, "\r\n");
    while (length && strchr(" .", text[length - 1])) length--;
    fail(self, "%s: %.*s.", what, length, text);
    self->oga.OgaDestroyResult(result);
    return LLAMA_ONNX_FAILED;
}

/* Reads a small text file of our own; NULL if it cannot be read. */
static char *read_text(const char *folder, const char *name) {
    size_t length;
    return read_file(folder, name, 1 << 22, &length);
}

/* ---- libraries -------------------------------------------------------------------------------- */

/* The version that the loaded ONNX Runtime reports. */
static const char *ort_version(module ort) {
    typedef struct {
        const void *(CALL *GetApi)(uint32_t);
        const char *(CALL *GetVersionString)(void);
    } OrtApiBase;
    typedef const OrtApiBase *(CALL * get_base)(void);
    void *found = symbol(ort, "OrtGetApiBase");
    get_base base;
    memcpy(&base, &found, sizeof found);
    return base && base() ? base()->GetVersionString() : "unknown";
}

static int check_version(llama_onnx *self, const char *folder) {
    const char *version = ort_version(self->ort);
    char *expected = read_text(folder, VERSION_FILE);
    int status = LLAMA_ONNX_OK;
    if (!expected) {
        return fail(self, "%s%s" VERSION_FILE " is missing: restore it from the bundle.",
                    folder, SEPARATOR);
    }
    expected[strcspn(expected, " \r\n")] = 0;
    if (strcmp(version, expected) != 0) {
        status = fail(self,
                      "%s%s" ORT_LIBRARY " is ONNX Runtime %s instead of %s: restore it from the "
                      "bundle.",
                      folder, SEPARATOR, version, expected);
    }
    free(expected);
    return status;
}

/* genai must use the ONNX Runtime that we loaded, not one that was loaded before. */
static int check_only_one(llama_onnx *self, const char *folder) {
    module given = loaded_module(ORT_LIBRARY);
    if (!given || given == self->ort) return LLAMA_ONNX_OK;
    char *other = module_path(given);
    fail(self,
         "the program has already loaded another ONNX Runtime, %s, so the one in %s cannot be "
         "used: open the package before anything else loads " ORT_LIBRARY ".",
         other ? other : "from an unknown path", folder);
    free(other);
    return LLAMA_ONNX_FAILED;
}

static int load_library(llama_onnx *self, const char *folder, const char *name, module *out) {
    char why[512], *path = join(folder, name);
    if (!path) return out_of_memory(self);
    if (!is_file(folder, name)) {
        fail(self, "%s is missing: restore it from the bundle.", path);
    } else if ((*out = load_module(path)) == NULL) {
        load_error(why, sizeof why);
        fail(self, "%s cannot be loaded: %s.", path, why);
    }
    free(path);
    return *out ? LLAMA_ONNX_OK : LLAMA_ONNX_FAILED;
}

static int load_api(llama_onnx *self, const char *folder) {
    for (size_t i = 0; i < sizeof api_members / sizeof *api_members; i++) {
        void *found = symbol(self->genai, api_members[i].name);
        if (!found) {
            return fail(self, "%s%s%s is another version, without %s: restore it from the bundle.",
                        folder, SEPARATOR, GENAI_LIBRARY, api_members[i].name);
        }
        memcpy((char *)&self->oga + api_members[i].offset, &found, sizeof found);
    }
    if (!telemetry_wanted()) self->oga.OgaSetTelemetryEnabled(false);
    return LLAMA_ONNX_OK;
}

static void unload(llama_onnx *self) {
    if (self->genai) unload_module(self->genai);
    if (self->ort) unload_module(self->ort);
    if (self->directml) unload_module(self->directml);
    self->genai = self->ort = self->directml = NULL;
}

/* Loads ONNX Runtime before genai, and DirectML before ONNX Runtime: each library then finds what
 * it needs already loaded and does not look for it elsewhere. */
static int load_libraries(llama_onnx *self, const char *folder, bool directml) {
    int status = LLAMA_ONNX_OK;
    telemetry_off();
    if (directml) status = load_library(self, folder, "DirectML.dll", &self->directml);
    if (!status) status = load_library(self, folder, ORT_LIBRARY, &self->ort);
    if (!status) status = check_only_one(self, folder);
    if (!status) status = check_version(self, folder);
    if (!status) status = load_library(self, folder, GENAI_LIBRARY, &self->genai);
    if (!status) status = load_api(self, folder);
    if (status) unload(self);
    return status;
}

/* ---- generating ------------------------------------------------------------------------------- */

typedef struct sink { /* receives new tokens: in `ids`, or as text through `callback` */
    int32_t *ids;
    size_t room, count;
    OgaTokenizerStream *stream;
    llama_onnx_callback callback;
    void *user;
} sink;

static int deliver(llama_onnx *self, sink *to, int32_t id) {
    const char *piece = "";
    if (to->ids) to->ids[to->count] = id;
    to->count++;
    if (!to->stream) return LLAMA_ONNX_OK;
    if (check(self, self->oga.OgaTokenizerStreamDecode(to->stream, id, &piece),
              "a token could not be decoded")) {
        return LLAMA_ONNX_FAILED;
    }
    /* A piece is empty until a character is complete. */
    return *piece && to->callback && to->callback(piece, to->user) ? LLAMA_ONNX_CANCELLED
                                                                   : LLAMA_ONNX_OK;
}

static bool is_cancelled(llama_onnx *self) {
    mutex_lock(&self->lock);
    bool cancelled = self->cancelled;
    mutex_unlock(&self->lock);
    return cancelled;
}

/* Holds the lock: after llama_onnx_cancel() has terminated the generator, IsDone throws a C++
 * exception, which C cannot catch. */
static bool is_over(llama_onnx *self, OgaGenerator *generator) {
    mutex_lock(&self->lock);
    bool over = self->cancelled || self->oga.OgaGenerator_IsDone(generator);
    mutex_unlock(&self->lock);
    return over;
}

static int generate_next(llama_onnx *self, OgaGenerator *generator, sink *to) {
    const int32_t *next;
    size_t count;
    int status = check(self, self->oga.OgaGenerator_GenerateNextToken(generator),
                       "the next token could not be computed");
    if (!status) {
        status = check(self, self->oga.OgaGenerator_GetNextTokens(generator, &next, &count),
                       "the next token could not be read");
    }
    return status ? status : deliver(self, to, next[0]);
}

static int run_generator(llama_onnx *self, OgaGenerator *generator, const int32_t *prompt,
                         size_t count, sink *to) {
    int status = check(self, self->oga.OgaGenerator_AppendTokens(generator, prompt, count),
                       "the prompt could not be processed");
    while (!status && to->count < to->room && !is_over(self, generator)) {
        status = generate_next(self, generator, to);
    }
    /* Checked before the status, because a terminated computation reports an error. */
    return is_cancelled(self) ? LLAMA_ONNX_CANCELLED : status;
}

static void set_generator(llama_onnx *self, OgaGenerator *generator) {
    mutex_lock(&self->lock);
    self->generator = generator;
    mutex_unlock(&self->lock);
}

static int generate(llama_onnx *self, const int32_t *prompt, size_t count, sink *to) {
    const api *oga = &self->oga;
    OgaGeneratorParams *params = NULL;
    OgaGenerator *generator = NULL;
    size_t context = (size_t)self->context_length;
    if (!count) return fail(self, "the prompt is empty.");
    for (size_t i = 0; i < count; i++) {
        if (prompt[i] < 0 || prompt[i] >= self->vocab_size) {
            return fail(self, "the prompt has the token %ld, but the model has tokens 0 to %d only.",
                        (long)prompt[i], self->vocab_size - 1);
        }
    }
    if (count >= context) {
        return fail(self, "the prompt has %zu tokens, but prompt and answer together may have %zu: "
                          "shorten the prompt.", count, context);
    }
    if (to->room > context - count) to->room = context - count;
    int status = check(self, oga->OgaCreateGeneratorParams(self->model, &params), self->package);
    if (!status) {
        /* The cache is sized for this prompt and answer, not for the model's whole context. */
        status = check(self, oga->OgaGeneratorParamsSetSearchNumber(params, "max_length",
                                                                    (double)(count + to->room)),
                       self->package);
    }
    if (!status) status = check(self, oga->OgaCreateGenerator(self->model, params, &generator),
                                self->package);
    if (!status) {
        set_generator(self, generator);
        status = run_generator(self, generator, prompt, count, to);
        set_generator(self, NULL);
    }
    if (generator) oga->OgaDestroyGenerator(generator);
    if (params) oga->OgaDestroyGeneratorParams(params);
    return status;
}

/* Returns whether the caller may generate now; if so, it must call end() afterwards. */
static bool begin(llama_onnx *self) {
    mutex_lock(&self->lock);
    bool free = !self->busy;
    if (free) {
        self->busy = true;
        self->cancelled = false;
        self->error[0] = 0;
    }
    mutex_unlock(&self->lock);
    return free;
}

static int end(llama_onnx *self, int status) {
    mutex_lock(&self->lock);
    self->busy = false;
    mutex_unlock(&self->lock);
    if (status != LLAMA_ONNX_FAILED) self->error[0] = 0; /* a cancelled computation reports one */
    return status;
}

static int encode(llama_onnx *self, const char *text, bool special, OgaSequences **out) {
    const char *keys[] = {"add_special_tokens"}, *values[] = {special ? "true" : "false"};
    const char *what = "the prompt could not be tokenized";
    int status = check(self, self->oga.OgaCreateSequences(out), what);
    if (!status) {
        status = check(self, self->oga.OgaUpdateTokenizerOptions(self->tokenizer, keys, values, 1),
                       "the tokenizer rejected its options");
    }
    if (!status) {
        status = check(self, self->oga.OgaTokenizerEncode(self->tokenizer, text, *out), what);
    }
    return status;
}

/* Makes the stream drop the space that SentencePiece puts before the first word of a text, by
 * decoding a special token first: an answer is a new text, not the continuation of the prompt. */
static int start_answer(llama_onnx *self, OgaTokenizerStream *stream) {
    const int32_t *ends;
    const char *nothing;
    size_t count;
    int status = check(self, self->oga.OgaTokenizerGetEosTokenIds(self->tokenizer, &ends, &count),
                       "the tokenizer has no end token");
    if (status || !count) return status;
    return check(self, self->oga.OgaTokenizerStreamDecode(stream, ends[0], &nothing),
                 "the answer could not be started");
}

static int generate_text(llama_onnx *self, const char *prompt, bool chat, int max_new_tokens,
                         llama_onnx_callback callback, void *user) {
    const api *oga = &self->oga;
    OgaSequences *tokens = NULL;
    sink to = {.room = (size_t)max_new_tokens, .callback = callback, .user = user};
    int status = check(self, oga->OgaCreateTokenizerStream(self->tokenizer, &to.stream),
                       "decoding could not be started");
    /* A chat template adds the special tokens itself, the start token included. */
    if (!status) status = encode(self, prompt, !chat, &tokens);
    if (!status && chat) status = start_answer(self, to.stream);
    if (!status) {
        status = generate(self, oga->OgaSequencesGetSequenceData(tokens, 0),
                          oga->OgaSequencesGetSequenceCount(tokens, 0), &to);
    }
    if (tokens) oga->OgaDestroySequences(tokens);
    if (to.stream) oga->OgaDestroyTokenizerStream(to.stream);
    return status;
}

static int check_call(llama_onnx *self, const void *prompt, int max_new_tokens) {
    if (!self->model) return fail(self, "there is no model: opening the package failed.");
    if (!prompt) return fail(self, "the prompt is NULL.");
    if (max_new_tokens < 1) return fail(self, "the number of new tokens must be at least 1.");
    return LLAMA_ONNX_OK;
}

int llama_onnx_generate(llama_onnx *self, const char *prompt, int max_new_tokens,
                        llama_onnx_callback callback, void *user) {
    if (!self) return LLAMA_ONNX_FAILED;
    if (!begin(self)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, prompt, max_new_tokens);
    if (!status && !is_utf8(prompt, strlen(prompt))) {
        status = fail(self, "the prompt is not UTF-8 text.");
    }
    if (!status) status = generate_text(self, prompt, false, max_new_tokens, callback, user);
    return end(self, status);
}

/* Formats a conversation with the model's chat template, after checking that the template cannot
 * keep onnxruntime-genai's engine busy for ever. */
static int apply_template(llama_onnx *self, const char *messages, const char **prompt) {
    buffer checked = {0};
    weights weights;
    char why[WHY];
    int status = LLAMA_ONNX_OK;
    if (!self->chat_template) {
        status = fail(self, "%s", self->no_chat);
    } else if (!read_messages(messages, &checked, &weights, why)) {
        status = fail(self, "%s", why);
    } else if (!template_check(self->chat_template, strlen(self->chat_template), weights, why)) {
        status = fail(self, "the model's chat template %s.", why);
    } else {
        status = check(self,
                       self->oga.OgaTokenizerApplyChatTemplate(
                           self->tokenizer, self->chat_template, checked.text, NULL, true, prompt),
                       "the model's chat template rejected the messages");
    }
    free(checked.text);
    return status;
}

int llama_onnx_chat(llama_onnx *self, const char *messages, int max_new_tokens,
                    llama_onnx_callback callback, void *user) {
    const char *prompt = NULL;
    if (!self) return LLAMA_ONNX_FAILED;
    if (!begin(self)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, messages, max_new_tokens);
    if (!status) status = apply_template(self, messages, &prompt);
    if (!status) status = generate_text(self, prompt, true, max_new_tokens, callback, user);
    if (prompt) self->oga.OgaDestroyString(prompt);
    return end(self, status);
}

int llama_onnx_generate_ids(llama_onnx *self, const int32_t *prompt, size_t prompt_count,
                            int32_t *ids, size_t *count) {
    sink to = {.ids = ids, .room = count ? *count : 0};
    if (count) *count = 0;
    if (!self) return LLAMA_ONNX_FAILED;
    if (!begin(self)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, prompt, to.room ? 1 : 0);
    if (!count || !ids) status = fail(self, "the place for the new tokens is NULL.");
    if (!status) status = generate(self, prompt, prompt_count, &to);
    if (count) *count = to.count;
    return end(self, status);
}

void llama_onnx_cancel(llama_onnx *self) {
    if (!self) return;
    mutex_lock(&self->lock);
    if (self->busy) self->cancelled = true;
    if (self->generator) {
        OgaResult *result =
            self->oga.OgaGenerator_SetRuntimeOption(self->generator, "terminate_session", "1");
        if (result) self->oga.OgaDestroyResult(result); /* generation then stops after this token */
    }
    mutex_unlock(&self->lock);
}

/* ---- opening ---------------------------------------------------------------------------------- */

static int read_config(llama_onnx *self) {
    config found;
    char why[WHY], sentence[SENTENCE];
    size_t length;
    char *text = read_file(self->package, "genai_config.json", 1 << 20, &length);
    if (!text) {
        return fail(self, "%s%sgenai_config.json %s.", self->package, SEPARATOR,
                    length ? "is too large" : "cannot be read");
    }
    bool sound = config_read(text, length, &found, why);
    free(text);
    if (!sound) return fail(self, "%s%sgenai_config.json %s.", self->package, SEPARATOR, why);
    if (!check_graph(self->package, &found, sentence)) return fail(self, "%s", sentence);
    self->context_length = found.context_length;
    self->vocab_size = found.vocab_size;
    return LLAMA_ONNX_OK;
}

static void keep_template(llama_onnx *self, const char *text, size_t length) {
    if (!is_utf8(text, length) || memchr(text, 0, length)) {
        explain(self->no_chat, "the model's chat template is not UTF-8 text.");
        return;
    }
    self->chat_template = malloc(length + 1);
    if (!self->chat_template) return;
    memcpy(self->chat_template, text, length);
    self->chat_template[length] = 0;
}

/* Finds the chat template where transformers looks for it: in chat_template.jinja, or else in
 * tokenizer_config.json. A package without one can still continue texts. */
static void read_template(llama_onnx *self) {
    size_t length;
    json settings;
    char *text = read_file(self->package, "chat_template.jinja", TEMPLATE_BYTES, &length);
    explain(self->no_chat, "the model has no chat template: use llama_onnx_generate().");
    if (text || length == SIZE_MAX) {
        if (text) keep_template(self, text, length);
        if (!text) explain(self->no_chat, "chat_template.jinja is too large.");
    } else if ((text = read_file(self->package, "tokenizer_config.json", 1 << 22, &length))) {
        bool sound = json_parse(&settings, text, length);
        const json_node *found = sound ? json_get(&settings, settings.nodes, "chat_template") : NULL;
        if (!sound) explain(self->no_chat, "tokenizer_config.json %.400s.", settings.why);
        if (found && found->kind == JSON_TEXT) keep_template(self, found->text, found->length);
        json_free(&settings);
    }
    free(text);
}

static void close_model(llama_onnx *self) {
    if (self->tokenizer) self->oga.OgaDestroyTokenizer(self->tokenizer);
    if (self->model) self->oga.OgaDestroyModel(self->model);
    self->tokenizer = NULL;
    self->model = NULL;
}

static int check_device(llama_onnx *self, const char *device) {
    const char *given = NULL;
    int status = check(self, self->oga.OgaModelGetDeviceType(self->model, &given), self->package);
    if (!status && strcmp(given, device) != 0) {
        status = fail(self, "%s should run on %s, but onnxruntime-genai opened it on %s.",
                      self->package, device, given);
    }
    if (given) self->oga.OgaDestroyString(given);
    return status;
}

/* `provider` is genai's name for it, NULL for the CPU. */
static int open_model(llama_onnx *self, const char *provider) {
    const api *oga = &self->oga;
    OgaConfig *config = NULL;
    int status = check(self, oga->OgaCreateConfig(self->package, &config), self->package);
    if (!status) status = check(self, oga->OgaConfigClearProviders(config), self->package);
    if (!status && provider) {
        status = check(self, oga->OgaConfigAppendProvider(config, provider), self->package);
        /* On in genai unless it is turned off. Packages of version 0.1 do not open with it. */
        if (!status) status = check(self, oga->OgaConfigSetProviderOption(config, provider,
                                    "enable_graph_capture", "0"), self->package);
    }
    if (!status) status = check(self, oga->OgaCreateModelFromConfig(config, &self->model),
                                self->package);
    if (!status) status = check_device(self, provider ? "DirectML" : "CPU");
    if (!status) status = check(self, oga->OgaCreateTokenizer(self->model, &self->tokenizer),
                                self->package);
    if (config) oga->OgaDestroyConfig(config);
    if (status) close_model(self);
    return status;
}

enum { TEST_ROOM = 512 };

typedef struct self_test {
    int32_t prompt[TEST_ROOM], expected[TEST_ROOM];
    size_t prompt_count, count;
} self_test;

/* Reads the numbers after `key` on its line and returns how many there are. */
static size_t read_numbers(const char *text, const char *key, int32_t *out) {
    const char *line = strstr(text, key);
    size_t count = 0;
    char *rest;
    if (!line) return 0;
    for (line += strlen(key); count < TEST_ROOM; line = rest) {
        long number = strtol(line, &rest, 10);
        if (rest == line || memchr(line, '\n', (size_t)(rest - line))) break;
        out[count++] = (int32_t)number;
    }
    return count;
}

static bool read_self_test(llama_onnx *self, self_test *test) {
    char *text = read_text(self->package, "selftest.txt");
    test->prompt_count = text ? read_numbers(text, "prompt ", test->prompt) : 0;
    test->count = text ? read_numbers(text, "expected ", test->expected) : 0;
    free(text);
    return test->prompt_count && test->count;
}

/* Checks that the device reproduces the expected tokens. */
static int run_self_test(llama_onnx *self, const self_test *test) {
    int32_t ids[TEST_ROOM];
    sink to = {.ids = ids, .room = test->count};
    if (generate(self, test->prompt, test->prompt_count, &to)) return LLAMA_ONNX_FAILED;
    for (size_t i = 0; i < test->count; i++) {
        if (i >= to.count || ids[i] != test->expected[i]) {
            return fail(self, "the self-test failed: token %zu of %zu is not the expected one",
                        i + 1, test->count);
        }
    }
    return LLAMA_ONNX_OK;
}

/* On failure, self->error is the rest of a sentence that starts "DirectML is not used: ". */
static int open_directml(llama_onnx *self, const char *libraries, bool required) {
    char device[256] = "";
    self_test test;
    bool has_test = read_self_test(self, &test);
    char *folder = join(libraries, "directml");
    int status = folder ? LLAMA_ONNX_OK : out_of_memory(self);
    if (!status && !is_file(folder, GENAI_LIBRARY)) {
        status = fail(self, "its libraries are not in %s", folder);
    } else if (!status && !has_test && !required) {
        status = fail(self, "%s has no selftest.txt to test the device with", self->package);
    } else if (!status && !find_device(device, sizeof device)) {
        status = fail(self, "this machine has no graphics device with Direct3D 12");
    }
    if (!status) status = load_libraries(self, folder, true);
    if (!status) status = open_model(self, ACCELERATOR);
    if (!status && has_test) status = run_self_test(self, &test);
    free(folder);
    if (status) {
        close_model(self);
        return status;
    }
    self->provider = "DirectML";
    snprintf(self->reason, sizeof self->reason, has_test
        ? "%s reproduced the tokens of the package's self-test."
        : "The program chose it; the package has no self-test for %s.", device);
    return LLAMA_ONNX_OK;
}

static int open_cpu(llama_onnx *self, const char *libraries) {
    int status = LLAMA_ONNX_OK;
    if (!self->genai) { /* DirectML's libraries, if loaded, can run on the CPU too */
        char *folder = join(libraries, "cpu");
        status = folder ? load_libraries(self, folder, false) : out_of_memory(self);
        free(folder);
    }
    if (!status) status = open_model(self, NULL);
    self->provider = "CPU";
    return status;
}

static int open_provider(llama_onnx *self, const char *libraries, const char *provider) {
    bool required = strcmp(provider, "directml") == 0, automatic = strcmp(provider, "auto") == 0;
    if (!required && !automatic && strcmp(provider, "cpu") != 0) {
        return fail(self, "there is no provider '%s': choose auto, cpu or directml.", provider);
    }
    if (required || automatic) {
        if (open_directml(self, libraries, required) == LLAMA_ONNX_OK) return LLAMA_ONNX_OK;
        size_t length = strlen(self->error);
        if (length && self->error[length - 1] == '.') self->error[length - 1] = 0;
        snprintf(self->reason, sizeof self->reason, "DirectML is not used: %.900s.", self->error);
        if (required) return fail(self, "%s", self->reason);
    } else {
        snprintf(self->reason, sizeof self->reason, "The program chose it.");
    }
    return open_cpu(self, libraries);
}

/* The full path of `given`, or of the folder that contains this library. */
static char *libraries_folder(const char *given) {
    if (given) return absolute(given);
    char *own = own_path(), *end = own ? strrchr(own, SEPARATOR[0]) : NULL;
    if (end) *end = 0;
    char *folder = own ? absolute(end ? own : ".") : NULL;
    free(own);
    return folder;
}

static int open_package(llama_onnx *self, const char *package, const llama_onnx_options *options) {
    self->package = absolute(package);
    if (!self->package) return fail(self, "the path of the package is not UTF-8.");
    if (!is_file(self->package, "genai_config.json")) {
        return fail(self, "%s is not a package: it does not exist or has no genai_config.json.",
                    self->package);
    }
    char why[SENTENCE];
    if (!check_files(self->package, options->check_hashes != 0, why)) return fail(self, "%s", why);
    if (read_config(self)) return LLAMA_ONNX_FAILED;
    read_template(self);
    char *libraries = libraries_folder(options->libraries);
    if (!libraries) return fail(self, "the path of the libraries is not UTF-8.");
    int status = open_provider(self, libraries, options->provider ? options->provider : "auto");
    free(libraries);
    return status;
}

int llama_onnx_open(const char *package, const llama_onnx_options *options, llama_onnx **out) {
    const llama_onnx_options defaults = {NULL, NULL, 0};
    if (!out) return LLAMA_ONNX_FAILED;
    llama_onnx *self = *out = calloc(1, sizeof *self);
    if (!self) return LLAMA_ONNX_FAILED;
    mutex_init(&self->lock);
    self->provider = "";
    if (!package) return fail(self, "the path of the package is NULL.");
    int status = open_package(self, package, options ? options : &defaults);
    if (!status) self->error[0] = 0;
    return status;
}

void llama_onnx_close(llama_onnx *self) {
    if (!self) return;
    close_model(self);
    /* The libraries stay loaded: ONNX Runtime keeps threads and cannot be unloaded safely. */
    mutex_destroy(&self->lock);
    free(self->chat_template);
    free(self->package);
    free(self);
}

const char *llama_onnx_error(const llama_onnx *self) {
    return self ? self->error : "there is not enough memory.";
}

const char *llama_onnx_provider(const llama_onnx *self) { return self ? self->provider : ""; }

const char *llama_onnx_provider_reason(const llama_onnx *self) { return self ? self->reason : ""; }
