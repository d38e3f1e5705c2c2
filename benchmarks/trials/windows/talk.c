/* Holds a conversation in one session and prints a line for each turn:
 *
 *     talk PACKAGE LIBRARIES COUNT TEXT...
 *
 *     turn FIRST_TOKEN_MILLISECONDS PROMPT_TOKENS CACHED_TOKENS IDS...
 *
 * Each TEXT, which has no quotes, is answered by COUNT tokens, greedily. Arguments are ASCII.
 */
#include "llama_onnx.h"

#include <stdio.h>
#include <stdlib.h>

static int failed(const char *error) {
    printf("error %s\n", error);
    return 1;
}

static int turn(llama_onnx_session *session, const llama_onnx_sampling *how, const char *text) {
    static int32_t ids[8192];
    static char message[8192];
    size_t count = 8192;
    llama_onnx_stats stats;
    snprintf(message, sizeof message, "[{\"role\": \"user\", \"content\": \"%s\"}]", text);
    if (llama_onnx_session_append_messages(session, message) ||
        llama_onnx_session_generate(session, how, NULL, NULL) ||
        llama_onnx_session_stats(session, &stats, sizeof stats) ||
        llama_onnx_session_ids(session, ids, &count)) {
        return failed(llama_onnx_session_error(session));
    }
    printf("turn %.0f %d %d", stats.first_token_seconds * 1000, (int)stats.prompt_tokens,
           (int)stats.cached_tokens);
    for (size_t i = stats.prompt_tokens; i < count && i < 8192; i++) printf(" %d", (int)ids[i]);
    printf("\n");
    return 0;
}

int main(int argc, char **argv) {
    llama_onnx *model;
    llama_onnx_session *session = NULL;
    llama_onnx_sampling how;
    if (argc < 5) return 64;
    const llama_onnx_options options = {argv[2], "cpu", 0};
    int status = llama_onnx_open(argv[1], &options, &model);
    if (status) return failed(llama_onnx_error(model));
    llama_onnx_sampling_defaults(model, &how, sizeof how);
    how.temperature = 0;
    how.max_new_tokens = atoi(argv[3]);
    status = llama_onnx_session_open(model, NULL, &session);
    if (status) return failed(llama_onnx_session_error(session));
    for (int i = 4; i < argc && !status; i++) status = turn(session, &how, argv[i]);
    llama_onnx_session_close(session);
    llama_onnx_close(model);
    return status;
}
