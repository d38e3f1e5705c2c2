/* Drives llama_onnx.dll for `nox -s windows` and prints one fact per line.
 *
 *     probe PACKAGE LIBRARIES PROVIDER CHECK_HASHES COUNT IDS [PRELOAD]
 *     probe PACKAGE LIBRARIES PROVIDER CHECK_HASHES -COUNT TEXT
 *
 * IDS are numbers separated by commas; a negative COUNT generates text and cancels it after that many
 * pieces. PRELOAD is a library to load first, as another part of an app might do.
 */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include "llama_onnx.h"

#include <stdio.h>
#include <stdlib.h>

typedef struct watcher {
    llama_onnx *model;
    int left;
} watcher;

static char *to_utf8(const wchar_t *text) {
    int size = WideCharToMultiByte(CP_UTF8, 0, text, -1, NULL, 0, NULL, NULL);
    char *out = malloc((size_t)size);
    WideCharToMultiByte(CP_UTF8, 0, text, -1, out, size, NULL, NULL);
    return out;
}

static DWORD WINAPI cancel(void *model) {
    llama_onnx_cancel(model);
    return 0;
}

/* Cancels from another thread, as a button would. */
static int watch(const char *text, void *user) {
    watcher *w = user;
    (void)text;
    if (--w->left == 0) {
        HANDLE thread = CreateThread(NULL, 0, cancel, w->model, 0, NULL);
        WaitForSingleObject(thread, INFINITE);
        CloseHandle(thread);
    }
    printf("piece\n");
    return 0;
}

static int generate_ids(llama_onnx *model, int wanted, char *list) {
    static int32_t prompt[4096], ids[4096];
    size_t prompt_count = 0, count = (size_t)wanted;
    for (char *rest = list; *rest; rest += *rest == ',') {
        prompt[prompt_count++] = (int32_t)strtol(rest, &rest, 10);
    }
    int status = llama_onnx_generate_ids(model, prompt, prompt_count, ids, &count);
    printf("ids");
    for (size_t i = 0; i < count; i++) printf(" %d", (int)ids[i]);
    printf("\n");
    return status;
}

int wmain(int argc, wchar_t **argv) {
    char *text[8] = {0};
    llama_onnx *model;
    for (int i = 1; i < argc && i < 8; i++) text[i] = to_utf8(argv[i]);
    if (argc < 7) return 64;
    if (argc > 7) printf("preloaded %d\n", LoadLibraryW(argv[7]) != NULL);
    llama_onnx_options options = {text[2], text[3], atoi(text[4])};
    int count = atoi(text[5]), status = llama_onnx_open(text[1], &options, &model);
    printf("opened %d\n", status);
    if (!status) {
        printf("provider %s\nreason %s\n", llama_onnx_provider(model),
               llama_onnx_provider_reason(model));
        watcher w = {model, -count};
        status = count > 0 ? generate_ids(model, count, text[6])
                           : llama_onnx_generate(model, text[6], 200, watch, &w);
    }
    printf("status %d\nerror %s\n", status, llama_onnx_error(model));
    llama_onnx_close(model);
    return 0;
}
