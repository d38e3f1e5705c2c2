/* Chats, or prints one answer, in the console.
 *
 *     llama_onnx_chat                          chats with the bundle's package, ..\package
 *     llama_onnx_chat PACKAGE                  chats with another package
 *     llama_onnx_chat PACKAGE "Some prompt"    continues the prompt and exits
 */
#ifdef _WIN32
#define _CRT_SECURE_NO_WARNINGS
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <io.h>
#else
#define _POSIX_C_SOURCE 200809L
#include <unistd.h>
#endif

#include "llama_onnx.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 8192, CONVERSATION = 1 << 20, ANSWER = 2048 };

/* ---- writing the JSON of a conversation ---- */

typedef struct conversation {
    char json[CONVERSATION];
    size_t size;
} conversation;

static void append(conversation *to, const char *text, size_t size) {
    if (to->size + size + 2 > sizeof to->json) { /* room for the closing bracket */
        fprintf(stderr, "Error: the conversation is too long for this sample.\n");
        exit(1);
    }
    memcpy(to->json + to->size, text, size);
    to->size += size;
    to->json[to->size] = 0;
}

static void append_escaped(conversation *to, const char *text) {
    char code[8];
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        int plain = c >= 0x20 && c != '"' && c != '\\';
        int size = plain ? 0 : snprintf(code, sizeof code, "\\u%04x", c);
        append(to, plain ? text : code, plain ? 1 : (size_t)size);
    }
}

static void append_text(conversation *to, const char *text) { append(to, text, strlen(text)); }

static void begin_message(conversation *to, const char *role) {
    append_text(to, to->size ? ", " : "[");
    append_text(to, "{\"role\": \"");
    append_text(to, role);
    append_text(to, "\", \"content\": \"");
}

/* ---- chat, and one answer ---- */

static int is_console(FILE *file) {
#ifdef _WIN32
    return _isatty(_fileno(file));
#else
    return isatty(fileno(file));
#endif
}

/* Prints text, in a console without what it could obey: control characters, and the bytes of C1
 * controls (U+0080 to U+009F). In a pipe or a file the text is data. */
static void show(FILE *to, const char *text) {
    int console = is_console(to);
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text, next = (unsigned char)text[1];
        int control = (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f;
        int control_c1 = c == 0xc2 && next >= 0x80 && next < 0xa0;
        if (console && control_c1) text++;
        putc(console && (control || control_c1) ? '?' : c, to);
    }
}

static int print_piece(const char *text, void *user) {
    (void)user;
    show(stdout, text);
    fflush(stdout);
    return 0;
}

static int print_and_keep(const char *text, void *user) {
    append_escaped(user, text);
    return print_piece(text, NULL);
}

static int report(const llama_onnx *model, int status) {
    printf("\n");
    if (status == LLAMA_ONNX_FAILED) fprintf(stderr, "Error: %s\n", llama_onnx_error(model));
    return status;
}

static int read_line(char *line, int size);

static int chat(llama_onnx *model) {
    static conversation talk;
    static char line[LINE];
    int status = LLAMA_ONNX_OK;
    while (!status && (printf("> "), fflush(stdout), read_line(line, sizeof line))) {
        begin_message(&talk, "user");
        append_escaped(&talk, line);
        append_text(&talk, "\"}");
        memcpy(talk.json + talk.size, "]", 2);
        /* The answer is appended to `talk` while it arrives, so the call gets a copy. */
        char *messages = malloc(talk.size + 2);
        if (!messages) return LLAMA_ONNX_FAILED;
        memcpy(messages, talk.json, talk.size + 2);
        begin_message(&talk, "assistant");
        status = report(model,
                        llama_onnx_chat(model, messages, ANSWER, print_and_keep, &talk));
        append_text(&talk, "\"}");
        free(messages);
    }
    return status;
}

static int run(const char *package, const char *prompt) {
    const llama_onnx_options options = {NULL, "auto", 1};
    llama_onnx *model;
    int status = llama_onnx_open(package, &options, &model);
    if (status) {
        report(model, status);
    } else {
        fprintf(stderr, "Runs on %s. %s\n", llama_onnx_provider(model),
                llama_onnx_provider_reason(model));
        status = prompt ? report(model, llama_onnx_generate(model, prompt, ANSWER, print_piece,
                                                            NULL))
                        : chat(model);
    }
    llama_onnx_close(model);
    return status;
}

/* ---- the command line and the console, in UTF-8 ---- */

#ifdef _WIN32
static char *to_utf8(const wchar_t *text) {
    int size = WideCharToMultiByte(CP_UTF8, 0, text, -1, NULL, 0, NULL, NULL);
    char *out = malloc((size_t)size);
    if (!out) exit(1);
    WideCharToMultiByte(CP_UTF8, 0, text, -1, out, size, NULL, NULL);
    return out;
}

/* A console must be read as UTF-16 to get every character; a file or pipe is read as UTF-8. */
static int read_line(char *line, int size) {
    HANDLE console = GetStdHandle(STD_INPUT_HANDLE);
    DWORD mode, count;
    wchar_t wide[LINE / 4];
    if (!GetConsoleMode(console, &mode)) {
        if (!fgets(line, size, stdin)) return 0;
    } else {
        if (!ReadConsoleW(console, wide, LINE / 4 - 1, &count, NULL) || !count) return 0;
        wide[count] = 0;
        char *text = to_utf8(wide);
        snprintf(line, (size_t)size, "%s", text);
        free(text);
    }
    line[strcspn(line, "\r\n")] = 0;
    return *line != 0 && *line != 0x1a;
}

/* The folder `package` beside the one that contains this program. */
static char *own_package(void) {
    static wchar_t path[32768];
    wchar_t *end;
    GetModuleFileNameW(NULL, path, 32768 - 16);
    end = wcsrchr(path, L'\\');
    wcscpy(end ? end : path, L"\\..\\package");
    return to_utf8(path);
}

/* wmain, because the arguments of main are in the machine's code page, which lacks characters. */
int wmain(int argc, wchar_t **argv) {
    SetConsoleOutputCP(CP_UTF8);
    char *package = argc > 1 ? to_utf8(argv[1]) : own_package();
    char *prompt = argc > 2 ? to_utf8(argv[2]) : NULL;
    int status = run(package, prompt);
    free(prompt);
    free(package);
    return status;
}
#else
static int read_line(char *line, int size) {
    if (!fgets(line, size, stdin)) return 0;
    line[strcspn(line, "\r\n")] = 0;
    return *line != 0;
}

int main(int argc, char **argv) {
    return run(argc > 1 ? argv[1] : "../package", argc > 2 ? argv[2] : NULL);
}
#endif
