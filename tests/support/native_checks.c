/* The checks of the C library, for tests that do not open a model. */
#define _GNU_SOURCE
#include "config.h"
#include "files.h"
#include "messages.h"
#include "template.h"

/* Each returns 1 if its input is accepted; otherwise `why` says what is wrong. */
int check_json(const char *text, size_t length, char *why) {
    json parsed;
    bool sound = json_parse(&parsed, text, length);
    explain(why, "%s", parsed.why);
    json_free(&parsed);
    return sound;
}

int check_config(const char *text, size_t length, char *why) {
    config found;
    return config_read(text, length, &found, why);
}

int check_name(const char *name) { return is_plain_name(name); }

/* `out` receives the messages as the library passes them on. */
int check_messages(const char *text, char *out, size_t room, char *why) {
    buffer written = {0};
    weights weights;
    bool sound = read_messages(text, &written, &weights, why);
    if (sound) snprintf(out, room, "%s", written.text);
    free(written.text);
    return sound;
}

int check_template(const char *text, const char *messages, char *why) {
    buffer written = {0};
    weights weights;
    bool sound = read_messages(messages, &written, &weights, why) &&
                 template_check(text, strlen(text), weights, why);
    free(written.text);
    return sound;
}

/* The keys that genai_config.json may have, one by one; NULL at the end. */
const char *config_key(size_t index) {
    return index < sizeof config_keys / sizeof *config_keys ? config_keys[index].path : NULL;
}
