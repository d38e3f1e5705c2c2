/* An opened package, the errors of calls, and the libraries that are loaded at run time. */
#ifndef LLAMA_ONNX_MODEL_H
#define LLAMA_ONNX_MODEL_H

#include "config.h"
#include "files.h"
#include "genai.h"
#include "graph.h"
#include "json.h"
#include "llama_onnx.h"
#include "messages.h"
#include "system.h"
#include "template.h"
#include "tokenizer.h"

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

/* What one answer at a time needs, of a model or of a session. */
typedef struct call {
    const api *oga;
    char error[2048];
    mutex lock; /* guards the next four, which cancelling uses from other threads */
    OgaGenerator *generator;
    bool busy, cancelled, terminated;
} call;

struct llama_onnx {
    api oga;
    module ort, genai, directml;
    OgaModel *model;
    OgaTokenizer *tokenizer;
    char *package; /* full path */
    config config; /* of genai_config.json */
    vocabulary *words; /* NULL if onnxruntime-genai's tokenizer is used: `not_own` says why */
    char not_own[WHY];
    char *chat_template; /* NULL if there is none, or none that can be used: `no_chat` */
    char no_chat[WHY];
    const char *provider;
    char reason[1024];
    call call;
    mutex engine; /* guards onnxruntime-genai's tokenizer and adapters, which sessions share */
    OgaAdapters *adapters;
    size_t sessions; /* that are open; guarded by call.lock, and so is the next */
    bool closed;     /* to be freed with the last session */
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

static int fail(call *self, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(self->error, sizeof self->error, format, arguments);
    va_end(arguments);
    make_printable(self->error);
    return LLAMA_ONNX_FAILED;
}

static int out_of_memory(call *self) { return fail(self, "there is not enough memory."); }

/* On failure, the error is `what` and the first line of genai's message. */
static int check(call *self, OgaResult *result, const char *what) {
    if (!result) return LLAMA_ONNX_OK;
    const char *text = self->oga->OgaResultGetError(result);
    int length = (int)strcspn(text, "\r\n");
    while (length && strchr(" .", text[length - 1])) length--;
    fail(self, "%s: %.*s.", what, length, text);
    self->oga->OgaDestroyResult(result);
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
        return fail(&self->call, "%s%s" VERSION_FILE " is missing: restore it from the bundle.",
                    folder, SEPARATOR);
    }
    expected[strcspn(expected, " \r\n")] = 0;
    if (strcmp(version, expected) != 0) {
        status = fail(&self->call,
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
    fail(&self->call,
         "the program has already loaded another ONNX Runtime, %s, so the one in %s cannot be "
         "used: open the package before anything else loads " ORT_LIBRARY ".",
         other ? other : "from an unknown path", folder);
    free(other);
    return LLAMA_ONNX_FAILED;
}

static int load_library(llama_onnx *self, const char *folder, const char *name, module *out) {
    char why[512], *path = join(folder, name);
    if (!path) return out_of_memory(&self->call);
    if (!is_file(folder, name)) {
        fail(&self->call, "%s is missing: restore it from the bundle.", path);
    } else if ((*out = load_module(path)) == NULL) {
        load_error(why, sizeof why);
        fail(&self->call, "%s cannot be loaded: %s.", path, why);
    }
    free(path);
    return *out ? LLAMA_ONNX_OK : LLAMA_ONNX_FAILED;
}

static int load_api(llama_onnx *self, const char *folder) {
    for (size_t i = 0; i < sizeof api_members / sizeof *api_members; i++) {
        void *found = symbol(self->genai, api_members[i].name);
        if (!found) {
            return fail(&self->call, "%s%s%s is another version, without %s: restore it from the bundle.",
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

#endif
