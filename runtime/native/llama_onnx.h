/* Generates text with a llama-onnx package, for any program that can call C.
 *
 * This is a thin layer over onnxruntime-genai. Its libraries are loaded at run time from your own
 * folder, never from System32 or PATH. All strings, paths included, are NUL-terminated UTF-8.
 *
 * Texts become the tokens that the model was trained with: the library reads tokenizer.json itself.
 * llama_onnx_tokenizer() says so if a package's is of a kind that it does not know, and then
 * onnxruntime-genai's tokenizer is used, which splits some texts differently.
 *
 * Threads: an opened package and each session of it do one thing at a time, and return
 * LLAMA_ONNX_BUSY to a second thread. Sessions of one package may run in different threads at once.
 * Only the functions that cancel may be called while another thread is in a call.
 *
 * Callbacks must return: an exception of C++ or a longjmp() out of one leaves its session busy for
 * ever. Catch it, keep it, return 1, and throw it after the call. A callback may call functions of
 * other sessions, but those of its own return LLAMA_ONNX_BUSY.
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
    /* Folder whose subfolders `cpu` and `directml` each contain a set of libraries, or which itself
     * contains that for the CPU. NULL: the folder of this library. */
    const char *libraries;
    /* "cpu", "directml" or "auto". NULL is "auto": DirectML if its libraries exist, the machine has
     * a device for it and that device reproduces the tokens in the package's selftest.txt, or else
     * the CPU. */
    const char *provider;
    /* Not 0: first compare every file of the package with its SHA256SUMS. Files that the list does
     * not name are refused too, except signatures, a README.md and what the hub's tools leave. */
    int check_hashes;
} llama_onnx_options;

/* Receives each piece of an answer, in the thread that generates. `text` contains whole characters,
 * without NUL, and is valid until the callback returns. Return 0 to continue, any other value to stop. */
typedef int (*llama_onnx_callback)(const char *text, void *user);

/* Opens the package in the folder `package`. `options` may be NULL.
 * *out is set even if opening fails: pass it to llama_onnx_error() then. Close it in either case.
 * It is NULL only if there is no memory for it.
 * Sets the environment variable ORT_DISABLE_TELEMETRY to 1 unless it is set already. */
LLAMA_ONNX_API int llama_onnx_open(const char *package, const llama_onnx_options *options,
                                   llama_onnx **out);

/* Compares every file of the package with its manifest.json, opens it as llama_onnx_open() does, and
 * replays its certificate: the logits of a few passages, read in one pass, token by token and after
 * going back, must be within the limits that `llama-onnx verify` has for the provider. That finds
 * files that were changed, and a package or a machine that computes something else. It does not find
 * a forger, who can change manifest and certificate too: signatures do. `report`, which may be NULL,
 * gets a line of text for each check; what it returns does not matter.
 * The package in *out is open if the result is LLAMA_ONNX_OK; otherwise it has the error. */
LLAMA_ONNX_API int llama_onnx_verify(const char *package, const llama_onnx_options *options,
                                     llama_onnx_callback report, void *user, llama_onnx **out);

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

/* "" if texts become the tokens of the model's training; otherwise a sentence that says why
 * onnxruntime-genai's tokenizer is used. */
LLAMA_ONNX_API const char *llama_onnx_tokenizer(const llama_onnx *self);

/* Writes the tokens of `length` bytes of text, valid UTF-8. With `special`, they include those that
 * the vocabulary puts before a text, unless it begins with them. `*count` is the capacity of `ids` on
 * input and the number of the text's tokens on output, which may be larger. */
LLAMA_ONNX_API int llama_onnx_encode(llama_onnx *self, const char *text, size_t length, int special,
                                     int32_t *ids, size_t *count);

/* Writes the text of tokens and a NUL, without special tokens, NULs inside and half a character at
 * the end. `*size` is the capacity of `text` on input and the size of the text without the NUL on
 * output, which may be larger; the text is then cut. */
LLAMA_ONNX_API int llama_onnx_decode(llama_onnx *self, const int32_t *ids, size_t count, char *text,
                                     size_t *size);

/* The provider that runs the model: "DirectML" or "CPU". */
LLAMA_ONNX_API const char *llama_onnx_provider(const llama_onnx *self);

/* Why that provider was chosen, as a sentence to display. */
LLAMA_ONNX_API const char *llama_onnx_provider_reason(const llama_onnx *self);

/* ---- sessions ---------------------------------------------------------------------------------
 *
 * A session is a text that grows: a conversation, or anything else. The model keeps what it computed
 * of it, so that an answer takes the time of what is new. (DirectML cannot add to what it computed:
 * there each answer reads the whole session again. So does an answer with a guide.)
 *
 * A session holds either messages or text and tokens, not both.
 */
typedef struct llama_onnx_session llama_onnx_session;

/* Set `size` to sizeof(llama_onnx_session_options), and members you do not need to 0. */
typedef struct llama_onnx_session_options {
    size_t size;
    /* The most tokens that the session may have, prompts and answers together. 0: 4096, or the
     * model's context if that is smaller. Memory for their keys and values is taken at once: for
     * each token 2 x layers x KV heads x head size x 4 bytes, 128 KiB for Llama 3.2 3B in fp32. */
    size_t max_tokens;
    /* The name of a LoRA adapter of the package; NULL for none. */
    const char *adapter;
} llama_onnx_session_options;

/* How an answer is chosen. Fill it with llama_onnx_sampling_defaults(), then change what you need. */
typedef struct llama_onnx_sampling {
    size_t size; /* sizeof(llama_onnx_sampling) */
    int max_new_tokens;
    double temperature; /* 0 is greedy: the next four and the seed then have no effect */
    int top_k;          /* 0: all tokens */
    double top_p;       /* 1: off */
    double min_p;       /* 0: off. Not with a guide, and not on DirectML */
    double repetition_penalty; /* 1: off */
    int no_repeat_ngram_size;  /* 0: off */
    int64_t seed; /* the same seed gives the same answer; -1: another one each time */
    const char *const *stop; /* texts that end the answer and are left out of it */
    size_t stop_count;
    const char *guide; /* NULL, or what the answer must be, of the kind `guide_kind`: */
    const char *guide_kind; /* "json_schema", "regex" or "lark_grammar" */
} llama_onnx_sampling;

enum {
    LLAMA_ONNX_NOT_FINISHED = 0, /* no answer yet, or one that failed */
    LLAMA_ONNX_END = 1,          /* the model ended it */
    LLAMA_ONNX_LENGTH = 2,       /* max_new_tokens, or the session is full */
    LLAMA_ONNX_STOP = 3,         /* a stop text */
    LLAMA_ONNX_STOPPED = 4       /* cancelled, or by the callback */
};

/* Of a session and its last answer. */
typedef struct llama_onnx_stats {
    size_t size;             /* sizeof(llama_onnx_stats) */
    size_t tokens;           /* of the session */
    size_t prompt_tokens;    /* before the answer, of which the model */
    size_t cached_tokens;    /* had read so many already */
    size_t generated_tokens; /* the end token included */
    double prompt_seconds, first_token_seconds, answer_seconds;
    double tokens_per_second; /* after the first; 0 for a single token */
    int finish;
} llama_onnx_stats;

/* Sets all members to what genai_config.json says; `size` is sizeof(llama_onnx_sampling). Returns
 * LLAMA_ONNX_FAILED if a pointer is NULL or the size is that of no version. */
LLAMA_ONNX_API int llama_onnx_sampling_defaults(const llama_onnx *model, llama_onnx_sampling *out,
                                                size_t size);

/* Begins an empty session; `options` may be NULL. *out is set even on failure, unless there is no
 * memory: it has the error, and must be closed. A model that is closed stays until its sessions are
 * closed too. */
LLAMA_ONNX_API int llama_onnx_session_open(llama_onnx *model,
                                           const llama_onnx_session_options *options,
                                           llama_onnx_session **out);

/* Adds `length` bytes of text, valid UTF-8. At the start of the session, tokens that the vocabulary
 * puts before a text come first. */
LLAMA_ONNX_API int llama_onnx_session_append_text(llama_onnx_session *self, const char *text,
                                                  size_t length);

LLAMA_ONNX_API int llama_onnx_session_append_ids(llama_onnx_session *self, const int32_t *ids,
                                                 size_t count);

/* Adds messages as for llama_onnx_chat(). The conversation so far, answers included, is formatted
 * with the model's chat template, and what its tokens have in common with those of the session
 * stays. */
LLAMA_ONNX_API int llama_onnx_session_append_messages(llama_onnx_session *self,
                                                      const char *messages);

/* Generates, and adds the answer to the session; to its messages too, if it has any. `sampling` may
 * be NULL. An answer that is stopped or cancelled stays in the session as far as it came. */
LLAMA_ONNX_API int llama_onnx_session_generate(llama_onnx_session *self,
                                               const llama_onnx_sampling *sampling,
                                               llama_onnx_callback callback, void *user);

/* Drops all tokens from the `position`-th on, and the messages that they are of. */
LLAMA_ONNX_API int llama_onnx_session_rewind(llama_onnx_session *self, size_t position);

/* Copies the tokens of the session: `*count` as in llama_onnx_encode(). */
LLAMA_ONNX_API int llama_onnx_session_ids(llama_onnx_session *self, int32_t *ids, size_t *count);

/* Writes tokens and messages to a file that only its owner can read, in place of an old one. Not the
 * keys and values, which onnxruntime-genai does not hand out: the first answer after loading reads
 * all tokens again. */
LLAMA_ONNX_API int llama_onnx_session_save(llama_onnx_session *self, const char *path);

/* Replaces the content of the session. Refuses a file that was saved with another package, another
 * version of it or another adapter; the session then stays as it is. */
LLAMA_ONNX_API int llama_onnx_session_load(llama_onnx_session *self, const char *path);

/* `size` is sizeof(llama_onnx_stats). */
LLAMA_ONNX_API int llama_onnx_session_stats(llama_onnx_session *self, llama_onnx_stats *out,
                                            size_t size);

/* Stops the answer in progress, from any thread. */
LLAMA_ONNX_API void llama_onnx_session_cancel(llama_onnx_session *self);

/* Frees the session. No other call of it may be in progress. */
LLAMA_ONNX_API void llama_onnx_session_close(llama_onnx_session *self);

/* As llama_onnx_error(). */
LLAMA_ONNX_API const char *llama_onnx_session_error(const llama_onnx_session *self);

#ifdef __cplusplus
}
#endif
#endif
