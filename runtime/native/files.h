/* The files of a package: which may be there, how they are read, and their hashes. */
#ifndef LLAMA_ONNX_FILES_H
#define LLAMA_ONNX_FILES_H

#include "json.h"
#include "sha256.h"
#include "system.h"

enum { SENTENCE = 1536, FILES = 10000, FOLDERS_DEEP = 8 };

#define SUMS "SHA256SUMS"

/* Files that may be beside a package without being in its SHA256SUMS. This library opens none. */
static const char *const unlisted_files[] = {
    SUMS, "manifest.json.sig", "README.md", "model.sig", "sbom.cdx.json", "sbom.spdx.json",
    "bundle.json", "bundle.json.sig", "bom.cdx.json", "inference_model.json",
    ".gitattributes",
};

/* The folder that a download from the hub leaves. */
#define DOWNLOAD_FOLDER ".cache/huggingface/"

static void say(char out[SENTENCE], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out, SENTENCE, format, arguments);
    va_end(arguments);
}

static char *join(const char *folder, const char *name) {
    size_t size = strlen(folder) + strlen(SEPARATOR) + strlen(name) + 1;
    char *out = malloc(size);
    if (out) snprintf(out, size, "%s%s%s", folder, SEPARATOR, name);
#ifdef _WIN32
    /* Paths with the prefix for long ones may have no other separator. */
    for (char *c = out ? out + strlen(folder) : NULL; c && *c; c++) {
        if (*c == '/') *c = '\\';
    }
#endif
    return out;
}

static bool is_file(const char *folder, const char *name) {
    char *path = join(folder, name);
    FILE *file = path ? open_file(path) : NULL;
    if (file) fclose(file);
    free(path);
    return file != NULL;
}

/* Reads a file of at most `limit` bytes and adds a NUL. Returns NULL if it is longer, if it cannot
 * be read or if there is no memory; `*length` is then SIZE_MAX for a file that is longer. */
static char *read_file(const char *folder, const char *name, size_t limit, size_t *length) {
    char *path = join(folder, name);
    FILE *file = path ? open_file(path) : NULL;
    char *bytes = file ? malloc(limit + 1) : NULL;
    *length = bytes ? fread(bytes, 1, limit + 1, file) : 0;
    bool sound = bytes && !ferror(file) && *length <= limit;
    if (bytes && *length > limit) *length = SIZE_MAX;
    if (file) fclose(file);
    free(path);
    if (!sound) {
        free(bytes);
        return NULL;
    }
    bytes[*length] = 0;
    return bytes;
}

static bool size_of_file(const char *folder, const char *name, uint64_t *size) {
    char *path = join(folder, name);
    FILE *file = path ? open_file(path) : NULL;
    int64_t found = file ? file_size(file) : -1;
    if (file) fclose(file);
    free(path);
    *size = found < 0 ? 0 : (uint64_t)found;
    return found >= 0;
}

/* ---- names ------------------------------------------------------------------------------------ */

/* Whether Windows takes `part`, a name up to its first dot, for a device. */
static bool is_device(const char *part, size_t length) {
    static const char *const names[] = {"con", "prn", "aux", "nul", "com", "lpt"};
    char lower[8] = "";
    while (length && part[length - 1] == ' ') length--;
    for (size_t i = 0; i < length && i < 7; i++) {
        lower[i] = part[i] >= 'A' && part[i] <= 'Z' ? (char)(part[i] + 32) : part[i];
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strncmp(lower, names[i], 3)) continue;
        bool digit = length == 4 && lower[3] >= '0' && lower[3] <= '9';
        if (i < 4 ? length == 3 : digit) return true;
    }
    return false;
}

/* Whether the character at `text` shows as itself: no control character, no mark that reorders a
 * line. */
static bool is_shown(const char *text, size_t size) {
    const unsigned char *c = (const unsigned char *)text;
    if (size == 1) return c[0] >= 0x20 && c[0] != 0x7f;
    if (size == 2) return !(c[0] == 0xc2 && c[1] < 0xa0) && !(c[0] == 0xd8 && c[1] == 0x9c);
    if (size != 3 || c[0] != 0xe2) return true;
    return !(c[1] == 0x80 && (c[2] == 0x8e || c[2] == 0x8f || (c[2] >= 0xa8 && c[2] <= 0xae))) &&
           !(c[1] == 0x81 && c[2] >= 0xa6 && c[2] <= 0xa9);
}

/* Whether `name` is a relative path that stays below its folder on every system. */
static bool is_plain_name(const char *name) {
    if (!is_utf8(name, strlen(name)) || strpbrk(name, "\\:*?\"<>|")) return false;
    for (const char *c = name; *c;) {
        size_t size = utf8_size((const unsigned char *)c, strlen(c));
        if (!is_shown(c, size)) return false;
        c += size;
    }
    for (const char *part = name;; part += strcspn(part, "/") + 1) {
        size_t length = strcspn(part, "/");
        if (!length || part[length - 1] == '.' || part[length - 1] == ' ') return false;
        if (is_device(part, strcspn(part, "./"))) return false;
        if (!part[length]) return true;
    }
}

/* ---- hashes ----------------------------------------------------------------------------------- */

/* The lines of SHA256SUMS, or the files of manifest.json, sorted by name. */
typedef struct sums {
    char *text;
    struct sum {
        const char *hash, *name;
    } *lines;
    size_t count;
    const char *index; /* the file that they are from */
} sums;

static int compare_sums(const void *a, const void *b) {
    return strcmp(((const struct sum *)a)->name, ((const struct sum *)b)->name);
}

static void sums_free(sums *list) {
    free(list->text);
    free(list->lines);
}

/* Reads "<64 hexadecimal digits>  <name>", as sha256sum writes it, or with "*" before the name, as
 * it does with --binary; the digits of other tools are in capitals. */
static bool sums_line(sums *list, char *line) {
    char *name = line + 66;
    bool sound = strspn(line, "0123456789abcdefABCDEF") == 64 && line[64] == ' ' &&
                 (line[65] == ' ' || line[65] == '*') && is_plain_name(name);
    if (!sound) return false;
    for (char *c = line; c < line + 64; c++) {
        if (*c >= 'A' && *c <= 'F') *c = (char)(*c + 32);
    }
    list->lines[list->count++] = (struct sum){line, name};
    return true;
}

/* Reads SHA256SUMS. Lines may end with CRLF, empty ones are skipped, and the last one needs no end.
 * Returns false and a sentence if it is damaged. */
static bool sums_read(const char *package, sums *list, char why[SENTENCE]) {
    size_t length, lines = 1;
    *list = (sums){.index = SUMS};
    list->text = read_file(package, SUMS, 1 << 22, &length);
    if (!list->text) {
        say(why, "%.900s has no " SUMS " to check: make a new bundle.", package);
        return false;
    }
    for (size_t i = 0; i < length; i++) lines += list->text[i] == '\n';
    list->lines = lines <= FILES ? malloc(lines * sizeof *list->lines) : NULL;
    if (!list->lines || memchr(list->text, 0, length)) {
        say(why, "%.900s is damaged: " SUMS " has %s.", package,
            lines > FILES ? "too many lines" : list->lines ? "a NUL in it" : "no room in memory");
        return false;
    }
    for (char *line = list->text, *next; line; line = next) {
        char *end = line + strcspn(line, "\n");
        next = *end ? end + 1 : NULL;
        *end = 0;
        if (end > line && end[-1] == '\r') end[-1] = 0;
        if (*line && !sums_line(list, line)) {
            say(why, "%.900s is damaged: " SUMS " has the invalid line \"%.200s\".", package, line);
            return false;
        }
    }
    qsort(list->lines, list->count, sizeof *list->lines, compare_sums);
    for (size_t i = 1; i < list->count; i++) {
        if (compare_sums(&list->lines[i - 1], &list->lines[i]) == 0) {
            say(why, "%.900s is damaged: " SUMS " names %.200s twice.", package,
                list->lines[i].name);
            return false;
        }
    }
    if (!list->count) say(why, "%.900s is damaged: " SUMS " is empty.", package);
    return list->count > 0;
}

/* The hash of the file `name` in the list, NULL if it is not there. */
static const char *sums_hash(const sums *list, const char *name) {
    struct sum key = {NULL, name};
    const struct sum *found = bsearch(&key, list->lines, list->count, sizeof key, compare_sums);
    return found ? found->hash : NULL;
}

static bool sums_have(const sums *list, const char *name) { return sums_hash(list, name) != NULL; }

static bool hash_file(const char *package, const char *name, char hex[65]) {
    const size_t limit = 1 << 20;
    char *path = join(package, name);
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
    return sound;
}

static bool sums_hold(const char *package, const sums *list, char why[SENTENCE]) {
    char hex[65];
    for (size_t i = 0; i < list->count; i++) {
        const char *name = list->lines[i].name;
        if (!hash_file(package, name, hex)) {
            say(why, "%.900s is incomplete: %.200s is missing or cannot be read.", package, name);
            return false;
        }
        if (memcmp(hex, list->lines[i].hash, 64)) {
            say(why, "%.900s is damaged: the hash of %.200s differs from %s.", package, name,
                list->index);
            return false;
        }
    }
    return true;
}

/* ---- the folder ------------------------------------------------------------------------------- */

typedef struct search {
    const char *package, *below; /* `below` is "" or the name of a folder in it, with a "/" */
    const sums *list;            /* NULL: hashes are not checked */
    size_t *left;
    int depth;
    char *why;
} search;

static bool search_folder(search *self);

static bool may_be_unlisted(const sums *list, const char *name) {
    /* The manifest does not list what bundles add. */
    bool added = strcmp(list->index, SUMS) != 0 && strcmp(name, "selftest.txt") == 0;
    if (added || strcmp(name, list->index) == 0) return true;
    for (size_t i = 0; i < sizeof unlisted_files / sizeof *unlisted_files; i++) {
        if (strcmp(name, unlisted_files[i]) == 0) return true;
    }
    return strncmp(name, DOWNLOAD_FOLDER, strlen(DOWNLOAD_FOLDER)) == 0;
}

/* Files with one of these suffixes are opened by name by a library, or run by a system. */
static const char *const opened_suffixes[] = {
    ".json", ".jinja", ".onnx", ".ort", ".so", ".dll", ".dylib", ".pyd", ".py", ".exe",
};

/* Those that exports and bundles write. */
static const char *const opened_files[] = {
    "model.onnx", "genai_config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "manifest.json", "bundle.json",
    "inference_model.json", "bom.cdx.json", "sbom.cdx.json", "sbom.spdx.json",
};

static bool ends_with(const char *name, const char *suffix) {
    size_t length = strlen(name), end = strlen(suffix);
    for (size_t i = 0; length >= end && i < end; i++) {
        char letter = name[length - end + i]; /* Windows takes A for a */
        if (letter >= 'A' && letter <= 'Z') letter = (char)(letter - 'A' + 'a');
        if (letter != suffix[i]) return false;
    }
    return length >= end;
}

/* Whether no library would open the file `name`, or exports write it. Folders hold what nothing
 * opens: the certificate, and what a download left. */
static bool is_harmless(const char *name) {
    bool opened = false;
    for (size_t i = 0; i < sizeof opened_files / sizeof *opened_files; i++) {
        if (strcmp(name, opened_files[i]) == 0) return true;
    }
    for (size_t i = 0; i < sizeof opened_suffixes / sizeof *opened_suffixes; i++) {
        opened = opened || ends_with(name, opened_suffixes[i]);
    }
    return !opened || strchr(name, '/');
}

static bool search_file(const search *self, const char *name, entry_kind kind) {
    if (kind == ENTRY_LINK) {
        say(self->why, "%.900s%s%.200s is a link that leads out of the package: replace it by the "
                       "file itself.", self->package, SEPARATOR, name);
    } else if (kind == ENTRY_OTHER) {
        say(self->why, "%.900s%s%.200s is not a regular file: remove it.", self->package, SEPARATOR,
            name);
    } else if (self->list && !sums_have(self->list, name) && !may_be_unlisted(self->list, name)) {
        say(self->why, "%.900s is damaged: %s does not name %.200s.", self->package,
            self->list->index, name);
    } else if (!is_harmless(name)) {
        say(self->why, "%.900s holds %.200s, which no export writes: remove it.", self->package,
            name);
    } else {
        return true;
    }
    return false;
}

static bool search_entry(void *user, const char *entry, entry_kind kind) {
    search *self = user;
    size_t size = strlen(self->below) + strlen(entry) + 2;
    char *name = malloc(size);
    bool sound = name != NULL;
    if (!(*self->left)--) {
        say(self->why, "%.900s has more than %d files.", self->package, FILES);
        *self->left = 0;
        sound = false;
    }
    if (name) snprintf(name, size, "%s%s%s", self->below, entry, kind == ENTRY_FOLDER ? "/" : "");
    if (sound && kind == ENTRY_FOLDER) {
        search inner = *self;
        inner.below = name;
        inner.depth++;
        sound = search_folder(&inner);
    } else if (sound) {
        sound = search_file(self, name, kind);
    }
    free(name);
    return sound;
}

static bool search_folder(search *self) {
    char *path = *self->below ? join(self->package, self->below) : NULL;
    bool deep = self->depth > FOLDERS_DEEP;
    if (path) path[strlen(path) - 1] = 0; /* the separator at the end */
    bool sound = !deep && (path || !*self->below) &&
                 list_folder(self->package, path ? path : self->package, search_entry, self);
    if (!sound && !*self->why) {
        say(self->why, "%.900s%s%.200s cannot be read.", self->package, SEPARATOR, self->below);
    }
    free(path);
    return sound;
}

/* Checks that the package contains nothing but regular files and, with a `list`, exactly those that
 * it has. Returns false and a sentence if not. */
static bool check_listed(const char *package, const sums *list, char why[SENTENCE]) {
    size_t left = FILES;
    search all = {package, "", list, &left, 0, why};
    why[0] = 0;
    return search_folder(&all) && (!list || sums_hold(package, list, why));
}

/* The same with SHA256SUMS as the list, if `hashes`. */
static bool check_files(const char *package, bool hashes, char why[SENTENCE]) {
    sums list = {.index = SUMS};
    why[0] = 0;
    bool sound = (!hashes || sums_read(package, &list, why)) &&
                 check_listed(package, hashes ? &list : NULL, why);
    sums_free(&list);
    return sound;
}

#endif
