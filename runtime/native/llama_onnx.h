/* Text from a llama-onnx package, for any program that can call C.
 *
 * A thin layer over onnxruntime-genai, whose libraries are loaded at run time from a folder of your
 * own, never from System32 or PATH. All text is UTF-8 and NUL-terminated, paths included.
 *
 * Prompts are cut into tokens by onnxruntime-genai. For SentencePiece vocabularies (Llama 2) its
 * version 0.18 cuts runs of several spaces elsewhere than the model was trained on; everything else
 * is cut as it should be. llama_onnx_generate_ids() takes tokens that you have made yourself.
 */
#ifndef LLAMA_ONNX_H
#define LLAMA_ONNX_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(LLAMA_ONNX_BUILD)
#define LLAMA_ONNX_API __declspec(dllexport)
#elif defined(LLAMA_ONNX_BUILD)
#define LLAMA_ONNX_API __attribute__((visibility("default")))
#else
#define LLAMA_ONNX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* A package, opened. One answer at a time; several may be open at once. */
typedef struct llama_onnx llama_onnx;

/* What every function that can fail returns. */
enum {
    LLAMA_ONNX_OK = 0,
    LLAMA_ONNX_FAILED = 1,    /* llama_onnx_error() says what and why */
    LLAMA_ONNX_CANCELLED = 2, /* by llama_onnx_cancel(), or because a callback asked for it */
    LLAMA_ONNX_BUSY = 3       /* another thread is generating with the same llama_onnx */
};

typedef struct llama_onnx_options {
    /* Folder whose subfolders `cpu` and `directml` hold one set of libraries each. NULL: the folder
     * that this library itself lies in. */
    const char *libraries;
    /* "cpu", "directml", or "auto" (as is NULL): DirectML where its libraries are there, the
     * machine has a device for it and that device gives the tokens of the package's selftest.txt;
     * otherwise the CPU. */
    const char *provider;
    /* Not 0: compare every file of the package with its SHA256SUMS first. */
    int check_hashes;
} llama_onnx_options;

/* Called with each piece of an answer: whole characters, valid until it returns. It runs in the
 * thread that generates. Return 0 to go on, anything else to stop. */
typedef int (*llama_onnx_callback)(const char *text, void *user);

/* Opens the package in the folder `package`. `options` may be NULL.
 * *out is set even when opening fails, so that llama_onnx_error() can say why, and is then good for
 * nothing else; close it either way. It is NULL only when there is no memory at all.
 * Sets the environment variable ORT_DISABLE_TELEMETRY to 1 unless it has a value already. */
LLAMA_ONNX_API int llama_onnx_open(const char *package, const llama_onnx_options *options,
                                   llama_onnx **out);

/* Continues `prompt` by `max_new_tokens` tokens at most. Sampling is as genai_config.json says,
 * which is greedy unless the model's makers chose otherwise. */
LLAMA_ONNX_API int llama_onnx_generate(llama_onnx *self, const char *prompt, int max_new_tokens,
                                       llama_onnx_callback callback, void *user);

/* Answers a conversation, put into the model's own chat template. `messages` is JSON:
 * [{"role": "user", "content": "Hello"}]; roles are system, user and assistant. */
LLAMA_ONNX_API int llama_onnx_chat(llama_onnx *self, const char *messages, int max_new_tokens,
                                   llama_onnx_callback callback, void *user);

/* The same on tokens: `*count` is the room in `ids` on the way in and the number of new tokens on
 * the way out, whatever is returned. An end token, if one is reached, is among them. */
LLAMA_ONNX_API int llama_onnx_generate_ids(llama_onnx *self, const int32_t *prompt,
                                           size_t prompt_count, int32_t *ids, size_t *count);

/* Ends the answer in progress, from any thread, even while a long prompt is read. Without one it
 * does nothing. */
LLAMA_ONNX_API void llama_onnx_cancel(llama_onnx *self);

/* Frees everything. No other call may be in progress: cancel, wait for it to return, then close. */
LLAMA_ONNX_API void llama_onnx_close(llama_onnx *self);

/* The last failure in one sentence, "" if there was none. Valid until the next call. */
LLAMA_ONNX_API const char *llama_onnx_error(const llama_onnx *self);

/* What runs the model: "DirectML" or "CPU". */
LLAMA_ONNX_API const char *llama_onnx_provider(const llama_onnx *self);

/* Why it is that one, in a sentence for people. */
LLAMA_ONNX_API const char *llama_onnx_provider_reason(const llama_onnx *self);

#ifdef __cplusplus
}
#endif
#endif
