/* See llama_onnx.h. C11 without further libraries; builds with MSVC, MinGW and gcc. */
#ifdef _WIN32
#define _CRT_SECURE_NO_WARNINGS
#else
#define _GNU_SOURCE
#endif

#include "llama_onnx.h"
#include "generating.h"
#include "model.h"
#include "session.h"
#include "session_file.h"
#include "verifying.h"

/* ---- generating ------------------------------------------------------------------------------- */

static int check_call(llama_onnx *self, const void *prompt, int max_new_tokens) {
    if (!self->model) return fail(&self->call, "there is no model: opening the package failed.");
    if (!prompt) return fail(&self->call, "the prompt is NULL.");
    if (max_new_tokens < 1) return fail(&self->call, "the number of new tokens must be at least 1.");
    return LLAMA_ONNX_OK;
}

int llama_onnx_generate(llama_onnx *self, const char *prompt, int max_new_tokens,
                        llama_onnx_callback callback, void *user) {
    if (!self) return LLAMA_ONNX_FAILED;
    if (!call_begin(&self->call)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, prompt, max_new_tokens);
    if (!status && !is_utf8(prompt, strlen(prompt))) {
        status = fail(&self->call, "the prompt is not UTF-8 text.");
    }
    if (!status) status = generate_text(self, prompt, false, max_new_tokens, callback, user);
    return call_end(&self->call, status);
}

int llama_onnx_chat(llama_onnx *self, const char *messages, int max_new_tokens,
                    llama_onnx_callback callback, void *user) {
    const char *prompt = NULL;
    if (!self) return LLAMA_ONNX_FAILED;
    if (!call_begin(&self->call)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, messages, max_new_tokens);
    if (!status) status = apply_template(self, &self->call, messages, &prompt);
    if (!status) status = generate_text(self, prompt, true, max_new_tokens, callback, user);
    if (prompt) self->oga.OgaDestroyString(prompt);
    return call_end(&self->call, status);
}

int llama_onnx_generate_ids(llama_onnx *self, const int32_t *prompt, size_t prompt_count,
                            int32_t *ids, size_t *count) {
    sink to = {.ids = ids, .room = count ? *count : 0};
    if (count) *count = 0;
    if (!self) return LLAMA_ONNX_FAILED;
    if (!call_begin(&self->call)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, prompt, to.room ? 1 : 0);
    if (!count || !ids) status = fail(&self->call, "the place for the new tokens is NULL.");
    if (!status) status = generate(self, prompt, prompt_count, &to);
    if (count) *count = to.count;
    return call_end(&self->call, status);
}

void llama_onnx_cancel(llama_onnx *self) {
    if (self) call_cancel(&self->call);
}

int llama_onnx_encode(llama_onnx *self, const char *text, size_t length, int special, int32_t *out,
                      size_t *count) {
    ids found = {0};
    if (!self) return LLAMA_ONNX_FAILED;
    if (!call_begin(&self->call)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, text, 1);
    if (!status && (!count || (*count && !out))) {
        status = fail(&self->call, "the place for the tokens is NULL.");
    }
    if (!status) status = encode(self, &self->call, text, length, special != 0, &found);
    for (size_t i = 0; !status && i < found.count && i < *count; i++) out[i] = found.all[i];
    if (count) *count = status ? 0 : found.count;
    free(found.all);
    return call_end(&self->call, status);
}

int llama_onnx_decode(llama_onnx *self, const int32_t *given, size_t given_count, char *text,
                      size_t *size) {
    buffer found = {0};
    text_stream stream = {0};
    const char *piece;
    if (!self) return LLAMA_ONNX_FAILED;
    if (!call_begin(&self->call)) return LLAMA_ONNX_BUSY;
    int status = check_call(self, given_count ? (const void *)given : "", 1);
    if (!status && (!size || (*size && !text))) {
        status = fail(&self->call, "the place for the text is NULL.");
    }
    if (!status) status = stream_open(self, &self->call, &stream, true);
    for (size_t i = 0; i < given_count && !status; i++) {
        status = stream_put(self, &self->call, &stream, given[i], &piece);
        if (!status) put(&found, piece);
    }
    if (!status && found.full) status = out_of_memory(&self->call);
    size_t kept = status || !*size ? 0 : found.size < *size ? found.size : *size - 1;
    if (kept) memcpy(text, found.text, kept);
    if (!status && *size) text[kept] = 0;
    if (size) *size = status ? 0 : found.size;
    stream_close(self, &stream);
    free(found.text);
    return call_end(&self->call, status);
}

/* ---- opening ---------------------------------------------------------------------------------- */

static int read_config(llama_onnx *self) {
    config found;
    char why[WHY], sentence[SENTENCE];
    size_t length;
    char *text = read_file(self->package, "genai_config.json", 1 << 20, &length);
    if (!text) {
        return fail(&self->call, "%s%sgenai_config.json %s.", self->package, SEPARATOR,
                    length ? "is too large" : "cannot be read");
    }
    bool sound = config_read(text, length, &found, why);
    free(text);
    if (!sound) return fail(&self->call, "%s%sgenai_config.json %s.", self->package, SEPARATOR, why);
    if (!check_graph(self->package, &found, sentence)) return fail(&self->call, "%s", sentence);
    self->config = found;
    return LLAMA_ONNX_OK;
}

/* Reads tokenizer.json; if it is of a kind that we do not know, onnxruntime-genai's tokenizer is
 * used. */
static void read_tokenizer(llama_onnx *self) {
    char why[WHY] = "cannot be read";
    size_t length;
    char *text = read_file(self->package, "tokenizer.json", VOCABULARY_BYTES, &length);
    if (text) self->words = vocabulary_read(text, length, why);
    if (!self->words) {
        explain(self->not_own, "onnxruntime-genai's tokenizer is used, because tokenizer.json "
                               "%.400s: its tokens may differ from those of the model's training.",
                why);
        make_printable(self->not_own);
    }
    free(text);
}

static void keep_template(llama_onnx *self, const char *text, size_t length) {
    free(self->chat_template);
    self->chat_template = NULL;
    if (!is_utf8(text, length) || memchr(text, 0, length)) {
        explain(self->no_chat, "the model's chat template is not UTF-8 text.");
        return;
    }
    self->chat_template = malloc(length + 1);
    if (!self->chat_template) return;
    memcpy(self->chat_template, text, length);
    self->chat_template[length] = 0;
}

static void close_model(llama_onnx *self) {
    if (self->adapters) self->oga.OgaDestroyAdapters(self->adapters);
    if (self->tokenizer) self->oga.OgaDestroyTokenizer(self->tokenizer);
    self->adapters = NULL;
    if (self->model) self->oga.OgaDestroyModel(self->model);
    self->tokenizer = NULL;
    self->model = NULL;
}

static int check_device(llama_onnx *self, const char *device) {
    const char *given = NULL;
    int status = check(&self->call, self->oga.OgaModelGetDeviceType(self->model, &given), self->package);
    if (!status && strcmp(given, device) != 0) {
        status = fail(&self->call, "%s should run on %s, but onnxruntime-genai opened it on %s.",
                      self->package, device, given);
    }
    if (given) self->oga.OgaDestroyString(given);
    return status;
}

/* `provider` is genai's name for it, NULL for the CPU. */
static int open_model(llama_onnx *self, const char *provider) {
    const api *oga = &self->oga;
    OgaConfig *config = NULL;
    int status = check(&self->call, oga->OgaCreateConfig(self->package, &config), self->package);
    if (!status) status = check(&self->call, oga->OgaConfigClearProviders(config), self->package);
    if (!status && provider) {
        status = check(&self->call, oga->OgaConfigAppendProvider(config, provider), self->package);
        /* On in genai unless it is turned off. Packages of version 0.1 do not open with it. */
        if (!status) status = check(&self->call, oga->OgaConfigSetProviderOption(config, provider,
                                    "enable_graph_capture", "0"), self->package);
    }
    if (!status) status = check(&self->call, oga->OgaCreateModelFromConfig(config, &self->model),
                                self->package);
    if (!status) status = check_device(self, provider ? "DirectML" : "CPU");
    if (!status) status = check(&self->call, oga->OgaCreateTokenizer(self->model, &self->tokenizer),
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
            return fail(&self->call, "the self-test failed: token %zu of %zu is not the expected one",
                        i + 1, test->count);
        }
    }
    return LLAMA_ONNX_OK;
}

/* On failure, self->call.error is the rest of a sentence that starts "DirectML is not used: ". */
static int open_directml(llama_onnx *self, const char *libraries, bool required) {
    char device[256] = "";
    self_test test;
    bool has_test = read_self_test(self, &test);
    char *folder = join(libraries, "directml");
    int status = folder ? LLAMA_ONNX_OK : out_of_memory(&self->call);
    if (!status && !is_file(folder, GENAI_LIBRARY)) {
        status = fail(&self->call, "its libraries are not in %s", folder);
    } else if (!status && !has_test && !required) {
        status = fail(&self->call, "%s has no selftest.txt to test the device with", self->package);
    } else if (!status && !find_device(device, sizeof device)) {
        status = fail(&self->call, "this machine has no graphics device with Direct3D 12");
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
        /* Packages for NuGet have one folder for all libraries. */
        bool flat = folder && !is_file(folder, VERSION_FILE) && is_file(libraries, VERSION_FILE);
        status = folder ? load_libraries(self, flat ? libraries : folder, false)
                        : out_of_memory(&self->call);
        free(folder);
    }
    if (!status) status = open_model(self, NULL);
    self->provider = "CPU";
    return status;
}

static int open_provider(llama_onnx *self, const char *libraries, const char *provider) {
    bool required = strcmp(provider, "directml") == 0, automatic = strcmp(provider, "auto") == 0;
    if (!required && !automatic && strcmp(provider, "cpu") != 0) {
        return fail(&self->call, "there is no provider '%s': choose auto, cpu or directml.", provider);
    }
    if (required || automatic) {
        if (open_directml(self, libraries, required) == LLAMA_ONNX_OK) return LLAMA_ONNX_OK;
        size_t length = strlen(self->call.error);
        if (length && self->call.error[length - 1] == '.') self->call.error[length - 1] = 0;
        snprintf(self->reason, sizeof self->reason, "DirectML is not used: %.900s.", self->call.error);
        if (required) return fail(&self->call, "%s", self->reason);
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

/* Refuses a template that onnxruntime-genai would not survive to parse, as it does when it opens the
 * tokenizer. */
static int check_opens(llama_onnx *self, const char *text, size_t length) {
    char why[WHY];
    if (template_opens(text, length, why)) return LLAMA_ONNX_OK;
    return fail(&self->call, "the chat template of %s %s: onnxruntime-genai may not survive that.",
                self->package, why);
}

/* The same for the templates in tokenizer_config.json, one or a list of named ones; keeps one. */
static int read_settings_templates(llama_onnx *self, const json *settings) {
    const json_node *found = json_get(settings, settings->nodes, "chat_template");
    int status = LLAMA_ONNX_OK;
    if (found && found->kind == JSON_TEXT) {
        status = check_opens(self, found->text, found->length);
        if (!status) keep_template(self, found->text, found->length);
    }
    if (!found || found->kind != JSON_LIST) return status;
    for (const json_node *one = json_first(settings, found); one && !status;
         one = one->next ? &settings->nodes[one->next] : NULL) {
        const json_node *text = one->kind == JSON_OBJECT ? json_get(settings, one, "template") : NULL;
        if (text && text->kind == JSON_TEXT) status = check_opens(self, text->text, text->length);
    }
    return status;
}

/* Reads tokenizer_config.json, and refuses one that onnxruntime-genai would follow out of the
 * package: it opens the file that the entry tiktoken_file names, wherever that is. */
static int read_tokenizer_settings(llama_onnx *self) {
    size_t length;
    json settings;
    char *text = read_file(self->package, "tokenizer_config.json", 1 << 22, &length);
    if (!text && length != SIZE_MAX) return LLAMA_ONNX_OK;
    bool sound = text && json_parse(&settings, text, length);
    int status = LLAMA_ONNX_OK;
    if (!text) {
        status = fail(&self->call, "tokenizer_config.json of %s is too large.", self->package);
    } else if (!sound || settings.nodes->kind != JSON_OBJECT) {
        status = fail(&self->call, "tokenizer_config.json of %s is not a JSON object.", self->package);
    } else if (json_get(&settings, settings.nodes, "tiktoken_file")) {
        status = fail(&self->call, "tokenizer_config.json of %s names a file, tiktoken_file: no export "
                                   "writes it, so the package was altered.", self->package);
    } else {
        status = read_settings_templates(self, &settings);
    }
    if (text) json_free(&settings);
    free(text);
    return status;
}

/* Reads the chat template where transformers looks for it: in chat_template.jinja, or else in
 * tokenizer_config.json. A package without one can still continue texts. */
static int read_template(llama_onnx *self) {
    size_t length;
    explain(self->no_chat, "the model has no chat template: use llama_onnx_generate().");
    if (read_tokenizer_settings(self)) return LLAMA_ONNX_FAILED;
    char *text = read_file(self->package, "chat_template.jinja", TEMPLATE_BYTES, &length);
    int status = LLAMA_ONNX_OK;
    if (text) {
        status = check_opens(self, text, length);
        if (!status) keep_template(self, text, length);
    } else if (length == SIZE_MAX) {
        status = fail(&self->call, "chat_template.jinja of %s is too large.", self->package);
    }
    free(text);
    return status;
}

/* Opens the package, whose files are checked already. */
static int open_checked(llama_onnx *self, const llama_onnx_options *options) {
    if (read_config(self) || read_template(self)) return LLAMA_ONNX_FAILED;
    read_tokenizer(self);
    char *libraries = libraries_folder(options->libraries);
    if (!libraries) return fail(&self->call, "the path of the libraries is not UTF-8.");
    int status = open_provider(self, libraries, options->provider ? options->provider : "auto");
    free(libraries);
    return status;
}

static int find_package(llama_onnx *self, const char *package) {
    if (!package) return fail(&self->call, "the path of the package is NULL.");
    self->package = absolute(package);
    if (!self->package) return fail(&self->call, "the path of the package is not UTF-8.");
    if (is_file(self->package, "genai_config.json")) return LLAMA_ONNX_OK;
    return fail(&self->call,
                "%s is not a package: it does not exist or has no genai_config.json.",
                self->package);
}

static int open_package(llama_onnx *self, const llama_onnx_options *options) {
    char why[SENTENCE];
    if (!check_files(self->package, options->check_hashes != 0, why)) {
        return fail(&self->call, "%s", why);
    }
    return open_checked(self, options);
}

/* An empty handle; NULL if there is no memory for it. */
static llama_onnx *new_handle(void) {
    llama_onnx *self = calloc(1, sizeof *self);
    if (!self) return NULL;
    call_init(&self->call, &self->oga);
    mutex_init(&self->engine);
    self->provider = "";
    return self;
}

static const llama_onnx_options default_options = {NULL, NULL, 0};

int llama_onnx_open(const char *package, const llama_onnx_options *options, llama_onnx **out) {
    if (!out) return LLAMA_ONNX_FAILED;
    llama_onnx *self = *out = new_handle();
    if (!self) return LLAMA_ONNX_FAILED;
    int status = find_package(self, package);
    if (!status) status = open_package(self, options ? options : &default_options);
    if (!status) self->call.error[0] = 0;
    return status;
}

static int verify_package(llama_onnx *self, const llama_onnx_options *options,
                          llama_onnx_callback report, void *user) {
    char why[SENTENCE] = "", precision[16];
    sums manifest = {.index = "manifest.json"};
    certificate certificate = {.why = why};
    bool sound = manifest_read(self->package, &manifest, precision, why) &&
                 check_listed(self->package, &manifest, why);
    if (sound && report) report("files: as the manifest lists them", user);
    sound = sound && certificate_read(&certificate, self->package, &manifest, precision);
    int status = sound ? open_checked(self, options) : fail(&self->call, "%s", why);
    if (!status) status = replay_certificate(self, &certificate, report, user);
    certificate_free(&certificate);
    sums_free(&manifest);
    return status;
}

int llama_onnx_verify(const char *package, const llama_onnx_options *options,
                      llama_onnx_callback report, void *user, llama_onnx **out) {
    if (!out) return LLAMA_ONNX_FAILED;
    llama_onnx *self = *out = new_handle();
    if (!self) return LLAMA_ONNX_FAILED;
    int status = find_package(self, package);
    if (!status) {
        status = verify_package(self, options ? options : &default_options, report, user);
    }
    if (!status) self->call.error[0] = 0;
    return status;
}

static void free_model(llama_onnx *self) {
    close_model(self);
    /* The libraries stay loaded: ONNX Runtime keeps threads and cannot be unloaded safely. */
    mutex_destroy(&self->call.lock);
    mutex_destroy(&self->engine);
    vocabulary_free(self->words);
    free(self->chat_template);
    free(self->package);
    free(self);
}

void llama_onnx_close(llama_onnx *self) {
    if (!self) return;
    mutex_lock(&self->call.lock);
    bool last = !self->sessions;
    self->closed = true;
    mutex_unlock(&self->call.lock);
    if (last) free_model(self);
}

void llama_onnx_session_close(llama_onnx_session *self) {
    if (!self) return;
    llama_onnx *model = self->model;
    session_free(self);
    mutex_lock(&model->call.lock);
    bool last = --model->sessions == 0 && model->closed;
    mutex_unlock(&model->call.lock);
    if (last) free_model(model);
}

const char *llama_onnx_error(const llama_onnx *self) {
    return self ? self->call.error : "there is not enough memory.";
}

const char *llama_onnx_provider(const llama_onnx *self) { return self ? self->provider : ""; }

const char *llama_onnx_provider_reason(const llama_onnx *self) { return self ? self->reason : ""; }

const char *llama_onnx_tokenizer(const llama_onnx *self) { return self ? self->not_own : ""; }

/* ---- sessions --------------------------------------------------------------------------------- */

int llama_onnx_sampling_defaults(const llama_onnx *self, llama_onnx_sampling *out, size_t size) {
    if (!self || !out || size != sizeof *out) return LLAMA_ONNX_FAILED;
    const config *from = &self->config;
    *out = (llama_onnx_sampling){
        .size = size,
        .max_new_tokens = 256,
        .temperature = from->samples ? from->temperature : 0,
        .top_k = from->top_k > 0 ? (int)from->top_k : 0,
        .top_p = from->top_p,
        .repetition_penalty = from->repetition_penalty,
        .no_repeat_ngram_size = (int)from->no_repeat_ngram_size,
        .seed = -1,
    };
    return LLAMA_ONNX_OK;
}

static int open_session(llama_onnx_session *self, const llama_onnx_session_options *options) {
    size_t context = (size_t)self->model->config.context_length, wanted = options->max_tokens;
    if (options->size != sizeof *options) {
        return fail(&self->call, "the options are of another version: set their size.");
    }
    if (!self->model->model) {
        return fail(&self->call, "there is no model: opening the package failed.");
    }
    if (wanted == 1 || wanted > context) {
        return fail(&self->call, "max_tokens must be from 2 to %zu, the model's context.", context);
    }
    self->max_tokens = wanted ? wanted : context < SESSION_TOKENS ? context : SESSION_TOKENS;
    if (!options->adapter) return LLAMA_ONNX_OK;
    if (!is_utf8(options->adapter, strlen(options->adapter))) {
        return fail(&self->call, "the name of the adapter is not UTF-8.");
    }
    self->adapter = malloc(strlen(options->adapter) + 1);
    if (!self->adapter) return out_of_memory(&self->call);
    strcpy(self->adapter, options->adapter);
    /* Now, so that a wrong name is not found only at the first answer. */
    return make_generator(self, NULL, 0, &self->generator);
}

int llama_onnx_session_open(llama_onnx *model, const llama_onnx_session_options *options,
                            llama_onnx_session **out) {
    const llama_onnx_session_options defaults = {.size = sizeof defaults};
    if (out) *out = NULL;
    if (!model || !out) return LLAMA_ONNX_FAILED;
    llama_onnx_session *self = *out = calloc(1, sizeof *self);
    if (!self) return LLAMA_ONNX_FAILED;
    self->model = model;
    call_init(&self->call, &model->oga);
    mutex_lock(&model->call.lock);
    model->sessions++;
    mutex_unlock(&model->call.lock);
    int status = open_session(self, options ? options : &defaults);
    if (status) {
        drop_generator(self);
        self->max_tokens = 0; /* every other call fails */
    }
    return status;
}

/* Returns LLAMA_ONNX_OK if the caller may use the session; it must call call_end() afterwards. */
static int session_begin(llama_onnx_session *self, const void *given) {
    if (!self) return LLAMA_ONNX_FAILED;
    if (!call_begin(&self->call)) return LLAMA_ONNX_BUSY;
    if (!self->max_tokens) {
        return call_end(&self->call, fail(&self->call, "there is no session: opening it failed."));
    }
    if (!given) return call_end(&self->call, fail(&self->call, "a pointer is NULL."));
    return LLAMA_ONNX_OK;
}

static int add_plain(llama_onnx_session *self, const int32_t *tokens, size_t count) {
    if (self->message_count) {
        return fail(&self->call, "the session has messages: open another one for text or tokens.");
    }
    int status = add_tokens(self, tokens, count);
    if (!status && count) self->has_text = true;
    return status;
}

int llama_onnx_session_append_text(llama_onnx_session *self, const char *text, size_t length) {
    ids found = {0};
    int status = session_begin(self, text);
    if (status) return status;
    status = encode(self->model, &self->call, text, length, !self->tokens.count, &found);
    if (!status) status = add_plain(self, found.all, found.count);
    free(found.all);
    return call_end(&self->call, status);
}

int llama_onnx_session_append_ids(llama_onnx_session *self, const int32_t *given, size_t count) {
    int status = session_begin(self, given);
    return status ? status : call_end(&self->call, add_plain(self, given, count));
}

int llama_onnx_session_append_messages(llama_onnx_session *self, const char *messages) {
    int status = session_begin(self, messages);
    return status ? status : call_end(&self->call, append_messages(self, messages));
}

int llama_onnx_session_generate(llama_onnx_session *self, const llama_onnx_sampling *sampling,
                                llama_onnx_callback callback, void *user) {
    llama_onnx_sampling how;
    int status = session_begin(self, "");
    if (status) return status;
    llama_onnx_sampling_defaults(self->model, &how, sizeof how);
    if (sampling && sampling->size != sizeof how) {
        status = fail(&self->call, "the sampling options are of another version: set their size.");
    } else {
        status = answer_session(self, sampling ? sampling : &how, callback, user);
    }
    return call_end(&self->call, status);
}

int llama_onnx_session_rewind(llama_onnx_session *self, size_t position) {
    int status = session_begin(self, "");
    if (status) return status;
    if (position > self->tokens.count) {
        status = fail(&self->call, "the session has %zu tokens: it cannot be rewound to %zu.",
                      self->tokens.count, position);
    } else {
        size_t kept = 0;
        while (kept < self->message_count && self->ends[kept].tokens <= position) kept++;
        keep_messages(self, kept);
        keep_tokens(self, position);
        self->has_text = self->has_text && position;
    }
    return call_end(&self->call, status);
}

int llama_onnx_session_ids(llama_onnx_session *self, int32_t *out, size_t *count) {
    int status = session_begin(self, count && (!*count || out) ? "" : NULL);
    if (status) return status;
    size_t room = *count;
    *count = self->tokens.count;
    for (size_t i = 0; i < *count && i < room; i++) out[i] = self->tokens.all[i];
    return call_end(&self->call, LLAMA_ONNX_OK);
}

int llama_onnx_session_save(llama_onnx_session *self, const char *path) {
    int status = session_begin(self, path);
    return status ? status : call_end(&self->call, save_session(self, path));
}

int llama_onnx_session_load(llama_onnx_session *self, const char *path) {
    int status = session_begin(self, path);
    return status ? status : call_end(&self->call, load_session(self, path));
}

int llama_onnx_session_stats(llama_onnx_session *self, llama_onnx_stats *out, size_t size) {
    int status = session_begin(self, out);
    if (status) return status;
    if (size != sizeof *out) {
        status = fail(&self->call, "the statistics are of another version.");
    } else {
        *out = self->stats;
        out->size = size;
        out->tokens = self->tokens.count;
    }
    return call_end(&self->call, status);
}

void llama_onnx_session_cancel(llama_onnx_session *self) {
    if (self) call_cancel(&self->call);
}

const char *llama_onnx_session_error(const llama_onnx_session *self) {
    return self ? self->call.error : "there is no session.";
}
