#include "io/st.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/map.h"
#include "base/mem.h"
#include "io/json.h"
#include "io/st_header.h"

typedef struct st_file {
    char *path;       /* owned */
    const char *name; /* the last part of path */
    map_file map;
    st_header header; /* its tensors move to the set's table; names and metadata stay */
} st_file;

struct st_set {
    st_file *files; /* the first n_listed are those that the index names */
    int64_t n_files, n_listed, room_files;
    st_tensor *tensors; /* [n_tensors], sorted by name */
    int64_t n_tensors;
};

int64_t st_elements(const st_tensor *t)
{
    return t->n_bytes / st_dtype_bytes(t->dtype);
}

/* ---- which files ------------------------------------------------------------------------ */

static int ends_with(const char *s, const char *tail)
{
    size_t n = strlen(s), m = strlen(tail);
    return n >= m && strcmp(s + n - m, tail) == 0;
}

static char *join(const char *dir, const char *name, err_info *e)
{
    size_t n = strlen(dir), m = strlen(name);
    char *path = mem_array(n + m + 2, 1, e);
    if (!path) return NULL;
    memcpy(path, dir, n);
    if (n == 0 || path[n - 1] != '/') path[n++] = '/';
    memcpy(path + n, name, m);
    return path;
}

/* Takes path over, also on failure. */
static err_code add_file(st_set *set, char *path, err_info *e)
{
    if (!path) return ERR_MEMORY;
    if (set->n_files == set->room_files) {
        int64_t room = 2 * set->room_files + 8;
        st_file *files = mem_array((size_t)room, sizeof *files, e);
        if (!files) {
            mem_free(path);
            return ERR_MEMORY;
        }
        if (set->n_files) memcpy(files, set->files, (size_t)set->n_files * sizeof *files);
        mem_free(set->files);
        set->files = files;
        set->room_files = room;
    }
    const char *slash = strrchr(path, '/');
    set->files[set->n_files++] = (st_file){.path = path, .name = slash ? slash + 1 : path};
    return ERR_NONE;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

typedef struct listing {
    const char **shards; /* [n] borrowed from the index */
    size_t n;
    err_info *e;
} listing;

static int list_shard(void *ctx, const char *tensor, size_t tensor_bytes, json_value *v)
{
    (void)tensor_bytes;
    listing *l = ctx;
    const char *shard = json_string(v, NULL);
    if (!st_plain_name(tensor))
        return (int)err_set(l->e, ERR_FORMAT, "tensor name is empty or has control characters");
    if (!shard || !st_plain_name(shard) || strchr(shard, '/') || !ends_with(shard, ".safetensors"))
        return (int)err_set(l->e, ERR_FORMAT,
                            "tensor %.255s: its shard is not a .safetensors file name", tensor);
    l->shards[l->n++] = shard;
    return 0;
}

/* The files that a weight_map names, sorted. */
static err_code add_listed(st_set *set, const char *dir, const json_value *map, err_info *e)
{
    listing l = {.shards = mem_array(json_length(map), sizeof *l.shards, e), .e = e};
    if (!l.shards) return ERR_MEMORY;
    err_code code = (err_code)json_each(map, list_shard, &l);
    qsort(l.shards, l.n, sizeof *l.shards, by_text);
    for (size_t i = 0; i < l.n && !code; i++)
        if (i == 0 || strcmp(l.shards[i - 1], l.shards[i]) != 0)
            code = add_file(set, join(dir, l.shards[i], e), e);
    mem_free(l.shards);
    return code;
}

static int by_file_name(const void *name, const void *file)
{
    return strcmp(name, ((const st_file *)file)->name);
}

static int is_listed(const st_set *set, const char *name)
{
    size_t n = (size_t)set->n_listed;
    return n && bsearch(name, set->files, n, sizeof *set->files, by_file_name) != NULL;
}

static int is_wanted(const struct dirent *d)
{
    return d->d_name[0] != '.' && ends_with(d->d_name, ".safetensors");
}

/* Files of the directory that are not in the set yet, sorted. A model*.safetensors that the index
 * does not name is a leftover of another save. */
static err_code add_unlisted(st_set *set, const char *dir, int has_index, err_info *e)
{
    struct dirent **found;
    int n = scandir(dir, &found, is_wanted, NULL);
    if (n < 0) return err_set(e, ERR_IO, "%s: %s", dir, strerror(errno));
    err_code code = ERR_NONE;
    char **names = mem_array((size_t)n, sizeof *names, e);
    if (!names) code = ERR_MEMORY;
    for (int i = 0; i < n && names; i++) names[i] = found[i]->d_name;
    if (names) qsort(names, (size_t)n, sizeof *names, by_text);
    for (int i = 0; i < n && !code; i++) {
        if (has_index && strncmp(names[i], "model", 5) == 0) continue;
        if (!is_listed(set, names[i])) code = add_file(set, join(dir, names[i], e), e);
    }
    for (int i = 0; i < n; i++) free(found[i]);
    free(found);
    mem_free(names);
    return code;
}

/* Fills set->files with a directory's files; *index is the index file, for the caller to close, or
 * NULL when there is none. */
static err_code list_directory(st_set *set, const char *dir, json_doc **index, err_info *e)
{
    char *path = join(dir, "model.safetensors.index.json", e);
    if (!path) return ERR_MEMORY;
    struct stat st;
    err_code code = ERR_NONE;
    if (stat(path, &st) == 0 || errno != ENOENT) {
        *index = json_read_file(path, e);
        json_value *map = *index ? json_get(json_root(*index), "weight_map") : NULL;
        if (!*index)
            code = e ? e->code : ERR_FORMAT;
        else if (json_type_of(map) != JSON_OBJECT)
            code = err_set(e, ERR_FORMAT, "%s: no weight_map object", path);
        else if ((code = add_listed(set, dir, map, e)))
            err_prefix(e, "%s", path);
    }
    mem_free(path);
    set->n_listed = set->n_files;
    if (!code) code = add_unlisted(set, dir, *index != NULL, e);
    if (!code && set->n_files == 0) code = err_set(e, ERR_IO, "%s: no .safetensors file", dir);
    return code;
}

/* ---- one table -------------------------------------------------------------------------- */

/* Moves the tensors that count to the end of the set's table: all of them without an index; with
 * one, what it lists from the files it lists and what it does not list from the others. */
static err_code take_tensors(st_set *set, st_file *f, const json_value *map, int listed,
                             err_info *e)
{
    st_header *h = &f->header;
    for (int64_t i = 0; i < h->n_tensors; i++) {
        st_tensor *t = &h->tensors[i];
        const char *shard = map ? json_string(json_get(map, t->name), NULL) : NULL;
        if (map && listed != (shard != NULL)) continue;
        if (shard && strcmp(shard, f->name) != 0)
            return err_set(e, ERR_FORMAT, "%s: tensor %s: the index places it in %s", f->path,
                           t->name, shard);
        set->tensors[set->n_tensors++] = *t;
    }
    mem_free(h->tensors);
    h->tensors = NULL;
    return ERR_NONE;
}

static int by_name(const void *a, const void *b)
{
    const st_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static err_code sort_table(st_set *set, err_info *e)
{
    qsort(set->tensors, (size_t)set->n_tensors, sizeof *set->tensors, by_name);
    for (int64_t i = 1; i < set->n_tensors; i++) {
        const st_tensor *t = &set->tensors[i - 1], *u = &set->tensors[i];
        if (strcmp(t->name, u->name) == 0)
            return err_set(e, ERR_FORMAT, "%s: tensor %s is also in %s", u->file, u->name, t->file);
    }
    return ERR_NONE;
}

typedef struct promise {
    const st_set *set;
    const char *dir;
    err_info *e;
} promise;

static int check_promise(void *ctx, const char *tensor, size_t tensor_bytes, json_value *v)
{
    (void)tensor_bytes;
    promise *p = ctx;
    if (st_find(p->set, tensor)) return 0;
    return (int)err_set(p->e, ERR_FORMAT,
                        "%s: tensor %.255s is not in %s, where the index places it", p->dir, tensor,
                        json_string(v, NULL));
}

/* Maps the files and builds the table. */
static err_code read_files(st_set *set, const char *path, const json_value *map, err_info *e)
{
    int64_t n = 0;
    for (int64_t i = 0; i < set->n_files; i++) {
        st_file *f = &set->files[i];
        err_code code = map_open(&f->map, f->path, e);
        if (code && i < set->n_listed) return err_prefix(e, "shard named by the index");
        if (!code) code = st_header_read(&f->header, &f->map, f->path, e);
        if (code) return code;
        n += f->header.n_tensors;
    }
    set->tensors = mem_array((size_t)n, sizeof *set->tensors, e);
    if (!set->tensors) return ERR_MEMORY;
    for (int64_t i = 0; i < set->n_files; i++) {
        err_code code = take_tensors(set, &set->files[i], map, i < set->n_listed, e);
        if (code) return code;
    }
    err_code code = sort_table(set, e);
    promise p = {set, path, e};
    if (!code && map) code = (err_code)json_each(map, check_promise, &p);
    return code;
}

st_set *st_open(const char *path, err_info *e)
{
    struct stat st;
    if (stat(path, &st) != 0) {
        err_set(e, ERR_IO, "%s: %s", path, strerror(errno));
        return NULL;
    }
    st_set *set = mem_array(1, sizeof *set, e);
    if (!set) return NULL;
    json_doc *index = NULL;
    err_code code = S_ISDIR(st.st_mode) ? list_directory(set, path, &index, e)
                                        : add_file(set, mem_copy(path, strlen(path), e), e);
    const json_value *map = index ? json_get(json_root(index), "weight_map") : NULL;
    if (!code) code = read_files(set, path, map, e);
    json_close(index);
    if (code) {
        st_close(set);
        return NULL;
    }
    return set;
}

void st_close(st_set *set)
{
    if (!set) return;
    for (int64_t i = 0; i < set->n_files; i++) {
        st_header_free(&set->files[i].header);
        map_close(&set->files[i].map);
        mem_free(set->files[i].path);
    }
    mem_free(set->files);
    mem_free(set->tensors);
    mem_free(set);
}

/* ---- looking up ------------------------------------------------------------------------- */

int64_t st_count(const st_set *set)
{
    return set->n_tensors;
}

const st_tensor *st_at(const st_set *set, int64_t i)
{
    return i >= 0 && i < set->n_tensors ? &set->tensors[i] : NULL;
}

const st_tensor *st_find(const st_set *set, const char *name)
{
    st_tensor key = {.name = name};
    return bsearch(&key, set->tensors, (size_t)set->n_tensors, sizeof key, by_name);
}

const char *st_metadata(const st_set *set, const char *key)
{
    const st_header *h = &set->files[0].header;
    const char *s = h->metadata;
    for (int64_t i = 0; i < h->n_metadata; i++) {
        const char *value = s + strlen(s) + 1;
        if (strcmp(s, key) == 0) return value;
        s = value + strlen(value) + 1;
    }
    return NULL;
}
