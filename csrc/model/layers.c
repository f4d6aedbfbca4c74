/* layers: all sequences through one layer, then through the next. */
#include "model/layers.h"

#include <stdlib.h>
#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "model/pass.h"

struct layers {
    ses *s;
    int32_t *ids;   /* [n_tokens] */
    int64_t *first; /* [n_sequences + 1] */
    int64_t n_sequences, n_tokens;
    float *x[2]; /* [n_tokens][H] pages, or a file's; the second only if streams are kept */
    int now;     /* the one that has the rows; */
    int kept;    /* -1, or the one that must not change */
    int in_file;
    int64_t n_done;
    const tap *tap;
    int is_cancelled; /* in a step, which left part of a sequence a layer further */
};

static size_t stream_bytes(const layers *r)
{
    return (size_t)r->n_tokens * (size_t)r->s->m->config.hidden_size * sizeof(float);
}

/* ---- opening -------------------------------------------------------------------------------- */

/* Also the longest sequence into *longest. */
static err_code check_sequences(const model_config *c, const int32_t *ids, const int64_t *first,
                                int64_t n_sequences, int64_t *longest, err_info *e)
{
    *longest = 0;
    for (int64_t i = 0; i < n_sequences; i++) {
        int64_t n = first[i + 1] - first[i];
        if (n < 1) return err_set(e, ERR_RANGE, "sequence %lld has no tokens", (long long)i);
        if (n > *longest) *longest = n;
    }
    if (!*longest) return err_set(e, ERR_RANGE, "no tokens to evaluate");
    for (int64_t i = 0; i < first[n_sequences]; i++)
        if (ids[i] < 0 || ids[i] >= c->vocab_size)
            return err_set(e, ERR_RANGE, "token id %d at position %lld is not below %d", ids[i],
                           (long long)i, c->vocab_size);
    return ERR_NONE;
}

/* A stream that is kept and one that the next layer writes. */
static err_code open_kept(layers *r, const layers_options *o, err_info *e)
{
    if (o->n_layers < 0 || o->n_layers > r->s->m->config.n_layers + 1 || (o->kept & ~1))
        return err_set(e, ERR_RANGE, "no layer %lld to go on after", (long long)o->n_layers);
    for (int i = 0; i < 2; i++)
        if (!(r->x[i] = map_kept(o->streams[i], stream_bytes(r), !o->n_layers, e))) return e->code;
    r->n_done = o->n_layers * r->n_sequences;
    if (o->n_layers) r->now = r->kept = o->kept;
    return ERR_NONE;
}

static err_code open_streams(layers *r, const layers_options *o, err_info *e)
{
    r->kept = -1;
    r->in_file = o->streams || o->scratch;
    if (o->streams) return open_kept(r, o, e);
    r->x[0] =
        o->scratch ? map_scratch(o->scratch, stream_bytes(r), e) : mem_pages(stream_bytes(r), e);
    return r->x[0] ? ERR_NONE : e->code;
}

static err_code open_into(layers *r, model *m, const int32_t *ids, const int64_t *first,
                          const layers_options *options, err_info *e)
{
    int64_t longest;
    if (check_sequences(&m->config, ids, first, r->n_sequences, &longest, e)) return e->code;
    ses_options session = {.n_ctx = longest, .codec = options->codec};
    if (!(r->s = ses_open_single(m, &session, e))) return e->code;
    r->tap = options->tap;
    if (!(r->ids = mem_array((size_t)r->n_tokens, sizeof *ids, e))) return e->code;
    if (!(r->first = mem_array((size_t)r->n_sequences + 1, sizeof *first, e))) return e->code;
    memcpy(r->ids, ids, (size_t)r->n_tokens * sizeof *ids);
    memcpy(r->first, first, ((size_t)r->n_sequences + 1) * sizeof *first);
    return open_streams(r, options, e);
}

layers *layers_open(model *m, const int32_t *ids, const int64_t *first, int64_t n_sequences,
                    const layers_options *options, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    layers *r = mem_array(1, sizeof *r, e);
    if (!r) return NULL;
    r->n_sequences = n_sequences;
    r->n_tokens = first[n_sequences];
    if (open_into(r, m, ids, first, options, e)) {
        layers_close(r);
        return NULL;
    }
    return r;
}

void layers_close(layers *r)
{
    if (!r) return;
    for (int i = 0; i < 2; i++)
        if (r->x[i]) mem_pages_free(r->x[i], stream_bytes(r));
    mem_free(r->first);
    mem_free(r->ids);
    ses_close(r->s);
    mem_free(r);
}

/* ---- running -------------------------------------------------------------------------------- */

/* The layer whose weights a tensor of this name holds; -1 for none. */
static int64_t layer_of(const char *name)
{
    const char *at = strstr(name, "layers.");
    if (!at || strncmp(name, "mtp.", 4) == 0 || (at > name && at[-1] != '.')) return -1;
    char *end;
    long layer = strtol(at + strlen("layers."), &end, 10);
    return *end == '.' ? layer : -1;
}

/* Pages of the files only: a matrix may also lie elsewhere, where forgetting is losing. */
static void forget_layer(const model *m, int64_t layer)
{
    for (int64_t i = 0; i < st_count(m->files); i++) {
        const st_tensor *t = st_at(m->files, i);
        if (layer_of(t->name) == layer) map_forget(t->data, (size_t)t->n_bytes);
    }
}

/* One sequence begins: an empty state, and in the first layer its embeddings. */
static void begin_sequence(layers *r, int64_t layer, int64_t begin, int64_t end)
{
    ses *s = r->s;
    const model *m = s->m;
    int64_t H = m->config.hidden_size;
    memset(s->S, 0, (size_t)ses_S_floats(s) * sizeof *s->S);
    memset(s->conv, 0, (size_t)ses_conv_floats(s) * sizeof *s->conv);
    for (int64_t i = begin; layer == 0 && i < end; i++)
        m->ops->decode[m->weights.embed.mode](&m->weights.embed, r->ids[i], r->x[r->now] + i * H);
}

/* Where a layer's rows go: into the stream they come from, unless that is kept. */
static int next_stream(const layers *r)
{
    return r->now == r->kept ? 1 - r->now : r->now;
}

/* The rows of a sequence that is through a layer: out of memory, where they lie in a file. */
static void forget_rows(const layers *r, int64_t begin, int64_t end)
{
    int64_t H = r->s->m->config.hidden_size;
    for (int i = 0; i < 2 && r->in_file; i++)
        if (r->x[i]) map_forget(r->x[i] + begin * H, (size_t)((end - begin) * H) * sizeof(float));
}

/* n tokens at position pos, which are rows of the stream from `row` on, through one layer. */
static void run_rows(layers *r, int64_t layer, int64_t row, int64_t pos, int64_t n)
{
    const model *m = r->s->m;
    const model_config *c = &m->config;
    pass *p = m->pass;
    const float *x = r->x[r->now] + row * c->hidden_size;
    float *out = r->x[next_stream(r)] + row * c->hidden_size;
    p->tap = r->tap;
    if (layer < c->n_layers) {
        size_t n_bytes = (size_t)(n * c->hidden_size) * sizeof *x;
        span sp = {r->s, pos, 0, n};
        pass_begin(p, &sp, 1);
        memcpy(p->x, x, n_bytes);
        pass_layer(p, &m->weights.layers[layer], (int)layer, c->is_full[layer], 0, n);
        memcpy(out, p->x, n_bytes);
        pass_end(p);
    } else {
        p->layer = c->n_layers;
        pass_norm(p, x, m->weights.norm, n, out);
        pass_show(p, TAP_HEAD, out, n, c->hidden_size, NULL);
    }
    p->tap = NULL;
}

int64_t layers_n_steps(const layers *r)
{
    return r->n_sequences * (r->s->m->config.n_layers + 1);
}

int64_t layers_n_done(const layers *r)
{
    return r->n_done;
}

err_code layers_step(layers *r, const cancel_flag *cancel, err_info *e)
{
    if (r->n_done == layers_n_steps(r)) return ERR_NONE;
    if (r->is_cancelled) return err_set(e, ERR_CANCELLED, "interrupted before");
    int64_t layer = r->n_done / r->n_sequences, sequence = r->n_done % r->n_sequences;
    int64_t begin = r->first[sequence], end = r->first[sequence + 1];
    begin_sequence(r, layer, begin, end);
    for (int64_t row = begin; row < end; row += SES_BATCH) {
        if (cancel_raised(cancel)) {
            r->is_cancelled = 1;
            return err_set(e, ERR_CANCELLED, "interrupted");
        }
        run_rows(r, layer, row, row - begin, end - row < SES_BATCH ? end - row : SES_BATCH);
    }
    forget_rows(r, begin, end);
    r->n_done++;
    if (r->n_done % r->n_sequences) return ERR_NONE;
    r->now = next_stream(r);
    forget_layer(r->s->m, layer);
    return ERR_NONE;
}

err_code layers_keep(layers *r, int *kept, err_info *e)
{
    if (!r->x[1]) return err_set(e, ERR_RANGE, "no files to keep the rows in");
    if (r->n_done % r->n_sequences || r->is_cancelled)
        return err_set(e, ERR_RANGE, "in the middle of a layer");
    if (map_sync(r->x[r->now], stream_bytes(r), e)) return e->code;
    *kept = r->kept = r->now;
    return ERR_NONE;
}

/* ---- reading out ---------------------------------------------------------------------------- */

const float *layers_rows(const layers *r)
{
    return r->x[r->now];
}

err_code layers_score(layers *r, int64_t row, int64_t n, const int32_t *targets, float *nll,
                      err_info *e)
{
    const model_config *c = &r->s->m->config;
    for (int64_t i = 0; i < n; i++)
        if (targets[i] >= c->vocab_size)
            return err_set(e, ERR_RANGE, "target id %d at position %lld is not below %d",
                           targets[i], (long long)i, c->vocab_size);
    pass_score(r->s->m->pass, r->x[r->now] + row * c->hidden_size, n, targets, nll);
    return ERR_NONE;
}
