/* See llama_onnx.h. C11 without further libraries; builds with MSVC, MinGW and gcc. */
#ifdef _WIN32
#define _CRT_SECURE_NO_WARNINGS
#else
#define _GNU_SOURCE
#endif

#include "llama_onnx.h"
#include "genai.h"
#include "sha256.h"
#include "system.h"

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
    int context_length;
    const char *provider;
    char reason[1024];
    char error[2048];
    mutex lock; /* guards the next three, which llama_onnx_cancel() uses from other threads */
    OgaGenerator *generator;
    bool busy, cancelled;
};

static int fail(llama_onnx *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(self->error, sizeof self->error, format, arguments);
    va_end(arguments);
    return LLAMA_ONNX_FAILED;
}

static int out_of_memory(llama_onnx *self) { return fail(self, "there is not enough memory."); }

/* On failure, the error is `what` and the first line of genai's message. */
static int check(llama_onnx *self, OgaResult *result, const char *what) {
    if (!result) return LLAMA_ONNX_OK;
    const char *text = self->oga.OgaResultGetError(result);
    fail(self, "%s: %.*s", what, (int)strcspn(text, "\r\n"), text);
    self->oga.OgaDestroyResult(result);
    return LLAMA_ONNX_FAILED;
}

static char *join(const char *folder, const char *name) {
    size_t size = strlen(folder) + strlen(SEPARATOR) + strlen(name) + 1;
    char *out = malloc(size);
    if (out) snprintf(out, size, "%s%s%s", folder, SEPARATOR, name);
    return out;
}

static bool is_file(const char *folder, const char *name) {
    char *path = join(folder, name);
    FILE *file = path ? open_file(path) : NULL;
    if (file) fclose(file);
    free(path);
    return file != NULL;
}

/* Reads a small text file; NULL if it cannot be read. */
static char *read_text(const char *folder, const char *name) {
    const size_t limit = 1 << 22;
    char *path = join(folder, name);
    FILE *file = path ? open_file(path) : NULL;
    char *text = file ? malloc(limit + 1) : NULL;
    if (text) text[fread(text, 1, limit, file)] = 0;
    if (file) fclose(file);
    free(path);
    return text;
}

/* ---- hashes ----------------------------------------------------------------------------------- */

static int hash_file(llama_onnx *self, const char *name, char hex[65]) {
    const size_t limit = 1 << 20;
    char *path = join(self->package, name);
    FILE *file = path ? open_file(path) : NULL;
    uint8_t *buffer = file ? malloc(limit) : NULL;
    sha256 hash = {.size = 0};
    size_t size;
    memcpy(hash.state, sha256_start, sizeof hash.state);
    while (buffer && (size = fread(buffer, 1, limit, file)) > 0) sha256_update(&hash, buffer, size);
    bool sound = buffer && !ferror(file);
    if (sound) sha256_finish(&hash, hex);
    if (file) fclose(file);
    free(buffer);
    free(path);
    if (sound) return LLAMA_ONNX_OK;
    return fail(self, "%s is incomplete: %s is missing or cannot be read.", self->package, name);
}

/* Checks a line "<64 hexadecimal digits>  <name>", the format of sha256sum. */
static int check_line(llama_onnx *self, const char *line) {
    char hex[65];
    const char *name = line + 66;
    bool sound = strspn(line, "0123456789abcdef") == 64 && strncmp(line + 64, "  ", 2) == 0;
    /* The list comes with the package: it must not make us read files outside the package. */
    if (!sound || !*name || *name == '/' || strpbrk(name, "\\:") || strstr(name, "..")) {
        return fail(self, "%s is damaged: SHA256SUMS has the invalid line \"%s\".", self->package,
                    line);
    }
    if (hash_file(self, name, hex)) return LLAMA_ONNX_FAILED;
    if (memcmp(hex, line, 64) == 0) return LLAMA_ONNX_OK;
    return fail(self, "%s is damaged: the hash of %s differs from SHA256SUMS.",
                self->package, name);
}

static int check_hashes(llama_onnx *self) {
    char *list = read_text(self->package, "SHA256SUMS");
    int status = LLAMA_ONNX_OK, lines = 0;
    if (!list) {
        return fail(self, "%s has no SHA256SUMS to check: make a new bundle.", self->package);
    }
    for (char *line = strtok(list, "\r\n"); line && !status; line = strtok(NULL, "\r\n"), lines++) {
        status = check_line(self, line);
    }
    free(list);
    if (!lines) return fail(self, "%s is damaged: SHA256SUMS is empty.", self->package);
    return status;
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
    if (!begin(self)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, prompt, max_new_tokens);
    if (!status) status = generate_text(self, prompt, false, max_new_tokens, callback, user);
    return end(self, status);
}

int llama_onnx_chat(llama_onnx *self, const char *messages, int max_new_tokens,
                    llama_onnx_callback callback, void *user) {
    const char *prompt = NULL;
    if (!begin(self)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, messages, max_new_tokens);
    if (!status) {
        status = check(self,
                       self->oga.OgaTokenizerApplyChatTemplate(self->tokenizer, NULL, messages,
                                                               NULL, true, &prompt),
                       "the model's chat template rejected the messages");
    }
    if (!status) status = generate_text(self, prompt, true, max_new_tokens, callback, user);
    if (prompt) self->oga.OgaDestroyString(prompt);
    return end(self, status);
}

int llama_onnx_generate_ids(llama_onnx *self, const int32_t *prompt, size_t prompt_count,
                            int32_t *ids, size_t *count) {
    sink to = {.ids = ids, .room = *count};
    *count = 0;
    if (!begin(self)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, prompt, to.room ? 1 : 0);
    if (!status) status = generate(self, prompt, prompt_count, &to);
    *count = to.count;
    return end(self, status);
}

void llama_onnx_cancel(llama_onnx *self) {
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

static int read_context_length(llama_onnx *self) {
    char *text = read_text(self->package, "genai_config.json");
    const char *key = text ? strstr(text, "\"context_length\"") : NULL;
    bool found = key && sscanf(key, "\"context_length\" : %d", &self->context_length) == 1;
    free(text);
    if (found && self->context_length > 1) return LLAMA_ONNX_OK;
    return fail(self, "%s%sgenai_config.json is damaged: it has no context length.",
                self->package, SEPARATOR);
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
    if (options->check_hashes && check_hashes(self)) return LLAMA_ONNX_FAILED;
    if (read_context_length(self)) return LLAMA_ONNX_FAILED;
    char *libraries = libraries_folder(options->libraries);
    if (!libraries) return fail(self, "the path of the libraries is not UTF-8.");
    int status = open_provider(self, libraries, options->provider ? options->provider : "auto");
    free(libraries);
    return status;
}

int llama_onnx_open(const char *package, const llama_onnx_options *options, llama_onnx **out) {
    const llama_onnx_options defaults = {NULL, NULL, 0};
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
    free(self->package);
    free(self);
}

const char *llama_onnx_error(const llama_onnx *self) {
    return self ? self->error : "there is not enough memory.";
}

const char *llama_onnx_provider(const llama_onnx *self) { return self->provider; }

const char *llama_onnx_provider_reason(const llama_onnx *self) { return self->reason; }
