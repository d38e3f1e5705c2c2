/* Generates text with a llama-onnx package, for any program that can call C.
 *
 * This is a thin layer over onnxruntime-genai. Its libraries are loaded at run time from your own
 * folder, never from System32 or PATH. All strings, paths included, are NUL-terminated UTF-8.
 *
 * onnxruntime-genai tokenizes the prompts. With SentencePiece vocabularies (Llama 2), version 0.18
 * splits runs of several spaces differently from the tokenizer that the model was trained with; all
 * other text is tokenized correctly. llama_onnx_generate_ids() accepts your own tokens.
 *
 * A package may come from a stranger. Before onnxruntime-genai sees it, this library refuses one
 * with links that lead out of it, with other entries in genai_config.json than a package needs, with
 * anything in model.onnx that exports do not write, such as loops, other operators or weights in
 * other files, and, at the first chat, with a chat template that could keep the engine busy or end
 * the process. The text of an answer may hold anything: do not send it to a console without taking
 * out the control characters, as the samples do.
 *
 * No function fails badly if a pointer is NULL.
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

/* An opened package. It generates one answer at a time; several packages may be open at once. */
typedef struct llama_onnx llama_onnx;

/* The status returned by every function that can fail. */
enum {
    LLAMA_ONNX_OK = 0,
    LLAMA_ONNX_FAILED = 1,    /* llama_onnx_error() returns the reason */
    LLAMA_ONNX_CANCELLED = 2, /* by llama_onnx_cancel() or by the callback */
    LLAMA_ONNX_BUSY = 3       /* another thread is generating with the same llama_onnx */
};

typedef struct llama_onnx_options {
    /* Folder whose subfolders `cpu` and `directml` each contain a set of libraries. NULL: the
     * folder of this library. */
    const char *libraries;
    /* "cpu", "directml" or "auto". NULL is "auto": DirectML if its libraries exist, the machine has
     * a device for it and that device reproduces the tokens in the package's selftest.txt, or else
     * the CPU. */
    const char *provider;
    /* Not 0: first compare every file of the package with its SHA256SUMS. Files that the list does
     * not name are refused too, except signatures, a README.md and what the hub's tools leave. */
    int check_hashes;
} llama_onnx_options;

/* Receives each piece of an answer, in the thread that generates. `text` contains whole characters
 * and is valid until the callback returns. Return 0 to continue, any other value to stop. */
typedef int (*llama_onnx_callback)(const char *text, void *user);

/* Opens the package in the folder `package`. `options` may be NULL.
 * *out is set even if opening fails: pass it to llama_onnx_error() then. Close it in either case.
 * It is NULL only if there is no memory for it.
 * Sets the environment variable ORT_DISABLE_TELEMETRY to 1 unless it is set already. */
LLAMA_ONNX_API int llama_onnx_open(const char *package, const llama_onnx_options *options,
                                   llama_onnx **out);

/* Continues `prompt`, valid UTF-8, with at most `max_new_tokens` tokens. genai_config.json sets the sampling,
 * which is greedy unless the model's authors chose otherwise. */
LLAMA_ONNX_API int llama_onnx_generate(llama_onnx *self, const char *prompt, int max_new_tokens,
                                       llama_onnx_callback callback, void *user);

/* Answers a conversation, formatted with the model's chat template. `messages` is JSON:
 * [{"role": "user", "content": "Hello"}]; roles are system, user and assistant. Each content is a
 * text, or a list of {"type": "text", "text": "..."}, whose texts are joined by line feeds.
 *
 * The template must be harmless for this conversation, because onnxruntime-genai's engine cannot be
 * interrupted. Refused are: more than 65,536 bytes, multiplication, macros that call themselves,
 * recursive loops, numbers above 10,000, texts that grow by more than what is added, loops that
 * take too long together, very long comments and runs of spaces, and tags, filters, functions and
 * methods that common templates do not use. */
LLAMA_ONNX_API int llama_onnx_chat(llama_onnx *self, const char *messages, int max_new_tokens,
                                   llama_onnx_callback callback, void *user);

/* Continues tokens of the model's vocabulary with tokens. `*count` is the capacity of `ids` on input and the number of new
 * tokens on output, for every status. They include the end token if it was reached. */
LLAMA_ONNX_API int llama_onnx_generate_ids(llama_onnx *self, const int32_t *prompt,
                                           size_t prompt_count, int32_t *ids, size_t *count);

/* Stops the answer in progress, from any thread, even while a long prompt is being processed. Does
 * nothing if there is none. */
LLAMA_ONNX_API void llama_onnx_cancel(llama_onnx *self);

/* Frees the model. No other call may be in progress: cancel it and wait until it returns first. */
LLAMA_ONNX_API void llama_onnx_close(llama_onnx *self);

/* The reason for the last failure, as a sentence without control characters, or "", also after an
 * answer was cancelled. Valid until the next call. */
LLAMA_ONNX_API const char *llama_onnx_error(const llama_onnx *self);

/* The provider that runs the model: "DirectML" or "CPU". */
LLAMA_ONNX_API const char *llama_onnx_provider(const llama_onnx *self);

/* Why that provider was chosen, as a sentence to display. */
LLAMA_ONNX_API const char *llama_onnx_provider_reason(const llama_onnx *self);

#ifdef __cplusplus
}
#endif
#endif
