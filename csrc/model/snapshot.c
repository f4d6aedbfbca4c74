/* snapshot: a timeline put aside, whole or only its recurrent state. Pages of keys and values are
 * shared, the state, which every token rewrites, is copied. */
#include "model/pass.h"

#include <string.h>

#include "base/mem.h"

int64_t ses_S_floats(const ses *s)
{
    const model_config *c = &s->m->config;
    return (int64_t)s->n_linear * c->lin_v_heads * c->lin_v_dim * c->lin_k_dim;
}

int64_t ses_conv_floats(const ses *s)
{
    const model_config *c = &s->m->config;
    return (int64_t)s->n_linear * (c->conv_kernel - 1) * config_conv_width(c);
}

/* The recurrent state changes layer by layer; what it was before the batch is what a cancelled
 * batch leaves behind. Rows that it wrote to the caches lie beyond n_past and do not count. */
void ses_save_state(ses *s)
{
    memcpy(s->saved, s->S, (size_t)ses_S_floats(s) * sizeof(float));
    memcpy(s->saved + ses_S_floats(s), s->conv, (size_t)ses_conv_floats(s) * sizeof(float));
}

void ses_restore_state(ses *s)
{
    memcpy(s->S, s->saved, (size_t)ses_S_floats(s) * sizeof(float));
    memcpy(s->conv, s->saved + ses_S_floats(s), (size_t)ses_conv_floats(s) * sizeof(float));
}

struct ses_snap {
    const model *m;
    kv_codec codec;
    int64_t n_past, n_mtp, logits_at;
    int32_t *ids; /* [n_past] */
    kv_pool *kv;
    kv_page **pages; /* [n_pages] shared with whoever else holds them */
    int64_t n_pages;
    float *S, *conv, *logits;
};

static err_code share_pages(ses_snap *snap, const ses *s, err_info *e)
{
    int64_t n = kv_n_pages(s->n_past > s->n_mtp ? s->n_past : s->n_mtp);
    if (!(snap->pages = mem_array((size_t)n, sizeof *snap->pages, e))) return e->code;
    if (kv_pool_promise(s->kv, n, e)) return e->code;
    snap->kv = s->kv;
    snap->n_pages = n;
    for (int64_t i = 0; i < n; i++) kv_page_keep(s->kv, snap->pages[i] = s->pages[i]);
    return ERR_NONE;
}

ses_snap *ses_snapshot(const ses *s, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    ses_snap *snap = mem_array(1, sizeof *snap, e);
    if (!snap) return NULL;
    size_t V = (size_t)s->m->config.vocab_size, f = sizeof(float);
    snap->m = s->m;
    snap->codec = s->codec;
    snap->n_past = s->n_past;
    snap->n_mtp = s->n_mtp;
    snap->logits_at = s->logits_at;
    if (!(snap->ids = mem_array((size_t)s->n_past, sizeof *snap->ids, e)) ||
        !(snap->S = mem_array((size_t)ses_S_floats(s), f, e)) ||
        !(snap->conv = mem_array((size_t)ses_conv_floats(s), f, e)) ||
        !(snap->logits = mem_array(V, f, e)) || share_pages(snap, s, e)) {
        ses_snap_close(snap);
        return NULL;
    }
    memcpy(snap->ids, s->ids, (size_t)s->n_past * sizeof *snap->ids);
    memcpy(snap->S, s->S, (size_t)ses_S_floats(s) * f);
    memcpy(snap->conv, s->conv, (size_t)ses_conv_floats(s) * f);
    memcpy(snap->logits, s->logits, V * f);
    return snap;
}

err_code ses_restore(ses *s, const ses_snap *snap, err_info *e)
{
    if (snap->m != s->m) return err_set(e, ERR_RANGE, "the snapshot is of another model");
    if (snap->codec != s->codec)
        return err_set(e, ERR_RANGE, "the snapshot's cache is %s, the session's %s",
                       kv_codec_name(snap->codec), kv_codec_name(s->codec));
    if (snap->n_past > s->n_ctx || snap->n_mtp > s->n_ctx)
        return err_set(e, ERR_LIMIT,
                       "the snapshot holds %lld tokens, the session has room for %lld",
                       (long long)snap->n_past, (long long)s->n_ctx);
    size_t f = sizeof(float);
    ses_drop_pages(s);
    for (int64_t i = 0; i < snap->n_pages; i++) kv_page_share(s->kv, s->pages[i] = snap->pages[i]);
    memcpy(s->ids, snap->ids, (size_t)snap->n_past * sizeof *s->ids);
    memcpy(s->S, snap->S, (size_t)ses_S_floats(s) * f);
    memcpy(s->conv, snap->conv, (size_t)ses_conv_floats(s) * f);
    memcpy(s->logits, snap->logits, (size_t)s->m->config.vocab_size * f);
    s->n_past = snap->n_past;
    s->n_mtp = snap->n_mtp;
    s->logits_at = snap->logits_at;
    return ERR_NONE;
}

void ses_snap_close(ses_snap *snap)
{
    if (!snap) return;
    for (int64_t i = 0; i < snap->n_pages; i++) kv_page_let_go(snap->kv, snap->pages[i]);
    if (snap->kv) kv_pool_return(snap->kv, snap->n_pages);
    mem_free(snap->pages);
    mem_free(snap->ids);
    mem_free(snap->S);
    mem_free(snap->conv);
    mem_free(snap->logits);
    mem_free(snap);
}

int64_t ses_snap_n_past(const ses_snap *snap)
{
    return snap->n_past;
}
