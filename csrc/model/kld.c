#include "model/kld.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/map.h"
#include "base/mem.h"
#include "model/replace.h"

/* ---- logits --------------------------------------------------------------------------------- */

typedef struct head { /* a model's logits, KLD_ROWS positions at a time */
    model *m;
    const num_matrix *w;  /* lm_head */
    float *logits;        /* [KLD_ROWS][V] */
    void *scratch, *rows; /* kern_linear's; rows NULL in f32 */
} head;

static int64_t rounded_row_bytes(const head *h)
{
    int64_t int8 = kern_int8_bytes(h->w->cols), bf16 = kern_bf16_bytes(h->m->ops, h->w->cols);
    return int8 > bf16 ? int8 : bf16;
}

static err_code head_open(head *h, model *m, int64_t vocab, err_info *e)
{
    *h = (head){.m = m, .w = m ? &m->weights.lm_head : NULL};
    h->logits = mem_array((size_t)vocab, KLD_ROWS * sizeof *h->logits, e);
    if (!h->logits) return ERR_MEMORY;
    if (!m) return ERR_NONE;
    h->scratch = mem_array((size_t)pool_n_threads(m->pool),
                           (size_t)kern_scratch_bytes(m->weights.lm_head.cols), e);
    if (!h->scratch) return ERR_MEMORY;
    if (!m->int8) return ERR_NONE;
    h->rows = mem_array(KLD_ROWS, (size_t)rounded_row_bytes(h), e);
    return h->rows ? ERR_NONE : ERR_MEMORY;
}

static void head_close(head *h)
{
    mem_free(h->logits);
    mem_free(h->scratch);
    mem_free(h->rows);
}

static void head_run(const head *h, const float *final, int64_t n)
{
    const num_matrix *w = h->w;
    kern_job job = {.w = w, .x = final, .y = h->logits, .ldx = w->cols, .n_x = n, .ldy = w->rows};
    if (h->rows)
        kern_linear_jobs_fast(h->m->pool, h->m->ops, &job, 1, w->cols, h->scratch, h->rows);
    else
        kern_linear_jobs(h->m->pool, h->m->ops, &job, 1, w->cols, h->scratch);
}

typedef struct row_facts {
    int32_t top;
    double log_z; /* ln sum e^x; not finite unless all of x is, apart from -inf */
} row_facts;

static int32_t best_of(const float *x, int64_t vocab)
{
    int32_t top = 0;
    for (int64_t i = 1; i < vocab; i++)
        if (x[i] > x[top]) top = (int32_t)i;
    return top;
}

static row_facts look_at(const float *x, int64_t vocab)
{
    row_facts r = {.top = best_of(x, vocab)};
    double best = x[r.top], z = 0;
    for (int64_t i = 0; i < vocab; i++) z += exp((double)x[i] - best);
    r.log_z = best + log(z);
    return r;
}

/* Also sum p (x - y), what ln p/q is on average but for the two log_z. Libm's exp in double: an
 * error of f32's size in log_z would be one in every KLD, and a position takes 20 times as long to
 * evaluate as to compare. */
static row_facts look_at_both(const float *x, const float *y, int64_t vocab, double *difference)
{
    row_facts r = {.top = best_of(x, vocab)};
    double best = x[r.top], z = 0, sum = 0;
    for (int64_t i = 0; i < vocab; i++) {
        double e = exp((double)x[i] - best);
        z += e;
        sum += e * ((double)x[i] - (double)y[i]);
    }
    r.log_z = best + log(z);
    *difference = sum / z;
    return r;
}

static err_code check_targets(const int32_t *targets, int64_t n, int64_t vocab, err_info *e)
{
    for (int64_t i = 0; i < n; i++)
        if (targets[i] < 0 || targets[i] >= vocab)
            return err_set(e, ERR_RANGE, "target id %d at position %lld is not below %lld",
                           targets[i], (long long)i, (long long)vocab);
    return ERR_NONE;
}

static err_code not_finite(const char *whose, int64_t position, err_info *e)
{
    return err_set(e, ERR_RANGE, "%s logits at position %lld are not finite", whose,
                   (long long)position);
}

/* ---- the file: reading ---------------------------------------------------------------------- */

static const char FORMAT[] = "moonlet reference";

typedef struct field { /* a tensor of the file; -1: any size, n: positions, v: tokens */
    const char *name;
    st_dtype dtype;
    size_t offset;
    char rows, cols;
} field;

#define AT(member) offsetof(kld_file, member)
static const field fields[] = {
    {"logprobs", ST_U16, AT(logprobs), 'n', 'v'},
    {"step", ST_F32, AT(step), 'n', 0},
    {"top", ST_I32, AT(top), 'n', 0},
    {"nll", ST_F32, AT(nll), 'n', 0},
    {"ids", ST_I32, AT(ids), 't', 0},
    {"targets", ST_I32, AT(targets), 't', 0},
    {"lengths", ST_I32, AT(lengths), 's', 0},
};
#undef AT
enum { N_FIELDS = sizeof fields / sizeof *fields };

/* What f32 may make of sums that are exact otherwise, in nats. */
static const float ROUNDING = 1e-3F;

static err_code find_field(kld_file *f, const char *path, const field *want, err_info *e)
{
    const st_tensor *t = st_find(f->set, want->name);
    if (!t) return err_set(e, ERR_FORMAT, "%s: tensor %s is missing", path, want->name);
    if (t->dtype != want->dtype || t->n_dims != (want->cols ? 2 : 1))
        return err_set(e, ERR_FORMAT, "%s: tensor %s is %s of %d dimensions", path, want->name,
                       st_dtype_name(t->dtype), t->n_dims);
    memcpy((char *)f + want->offset, &t, sizeof t);
    return ERR_NONE;
}

static int32_t int_at(const st_tensor *t, int64_t i)
{
    int32_t v;
    memcpy(&v, t->data + i * (int64_t)sizeof v, sizeof v);
    return v;
}

static float float_at(const st_tensor *t, int64_t i)
{
    float v;
    memcpy(&v, t->data + i * (int64_t)sizeof v, sizeof v);
    return v;
}

static err_code bad_file(const char *path, const char *what, err_info *e)
{
    return err_set(e, ERR_FORMAT, "%s: %s", path, what);
}

/* That the tensors belong together: callers rely on every length, id and step. */
static err_code check_file(kld_file *f, const char *path, err_info *e)
{
    f->n = f->logprobs->shape[0];
    f->vocab = f->logprobs->shape[1];
    int64_t n_ids = st_elements(f->ids), scored = 0, at = 0;
    if (f->vocab < 1 || f->vocab > INT32_MAX) return bad_file(path, "no vocabulary", e);
    if (st_elements(f->step) != f->n || st_elements(f->top) != f->n || st_elements(f->nll) != f->n)
        return bad_file(path, "tensors of different numbers of positions", e);
    if (st_elements(f->targets) != n_ids) return bad_file(path, "not as many targets as ids", e);
    for (int64_t i = 0; i < n_ids; i++) {
        int32_t id = int_at(f->ids, i), target = int_at(f->targets, i);
        if (id < 0 || id >= f->vocab || target >= f->vocab)
            return bad_file(path, "an id that is not in the vocabulary", e);
        scored += target >= 0;
    }
    if (scored != f->n) return bad_file(path, "not as many positions as targets", e);
    for (int64_t i = 0; i < st_elements(f->lengths); i++) {
        int32_t length = int_at(f->lengths, i);
        if (length < 1 || length > n_ids - at) return bad_file(path, "lengths of no sequence", e);
        at += length;
    }
    if (at != n_ids) return bad_file(path, "ids of no sequence", e);
    for (int64_t i = 0; i < f->n; i++) {
        float step = float_at(f->step, i), nll = float_at(f->nll, i);
        int32_t top = int_at(f->top, i);
        if (!(step >= 0) || !isfinite(step * 65535) || !(nll >= -ROUNDING) || !isfinite(nll) ||
            top < 0 || top >= f->vocab)
            return err_set(e, ERR_FORMAT, "%s: position %lld has step %g, nll %g, top %d", path,
                           (long long)i, (double)step, (double)nll, top);
    }
    return ERR_NONE;
}

static err_code open_into(kld_file *f, const char *path, err_info *e)
{
    if (!(f->set = st_open(path, e))) return e->code;
    const char *format = st_metadata(f->set, "format");
    if (!format || strcmp(format, FORMAT) != 0)
        return bad_file(path, "not a file of reference logits", e);
    for (int i = 0; i < N_FIELDS; i++)
        if (find_field(f, path, &fields[i], e)) return e->code;
    return check_file(f, path, e);
}

err_code kld_file_open(kld_file *f, const char *path, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    *f = (kld_file){0};
    if (!open_into(f, path, e)) return ERR_NONE;
    kld_file_close(f);
    return e->code;
}

void kld_file_close(kld_file *f)
{
    if (f->set) st_close(f->set);
    *f = (kld_file){0};
}

static void read_row(const kld_file *f, int64_t row, float *x)
{
    const uint8_t *codes = f->logprobs->data + row * f->vocab * 2;
    double step = float_at(f->step, row);
    for (int64_t i = 0; i < f->vocab; i++) {
        uint16_t c;
        memcpy(&c, codes + 2 * i, sizeof c);
        x[i] = (float)(-step * c);
    }
}

/* What speaks against a row x of the file, NULL if nothing does. Codes are half a step off at most,
 * and the sum of probabilities by no larger a factor. */
static const char *row_fault(const kld_file *f, int64_t row, const float *x, const row_facts *facts,
                             int32_t target)
{
    double off = 0.5 * (double)float_at(f->step, row) + (double)ROUNDING;
    if (!(fabs(facts->log_z) <= off)) return "its probabilities do not add up to 1";
    if (!(fabs((double)float_at(f->nll, row) + (double)x[target]) <= off))
        return "its nll is not that of its target";
    return x[int_at(f->top, row)] < x[facts->top] ? "its best token is not the best" : NULL;
}

/* ---- the file: writing ---------------------------------------------------------------------- */

enum { LOGPROBS, STEP, TOP, NLL, IDS, TARGETS, LENGTHS };

struct kld_writer {
    st_writer *out;
    int64_t n, vocab, done;
    uint16_t *codes; /* [KLD_ROWS][V] */
};

static st_entry entry_of(const field *f, const int64_t size[256])
{
    st_entry entry = {.name = f->name, .dtype = f->dtype, .n_dims = f->cols ? 2 : 1};
    entry.shape[0] = size[(uint8_t)f->rows];
    entry.shape[1] = size[(uint8_t)f->cols];
    return entry;
}

static err_code writer_into(kld_writer *w, const char *path, const kld_texts *t,
                            const char *model_name, const char *words, err_info *e)
{
    for (int64_t i = 0; i < t->n_ids; i++) w->n += t->targets[i] >= 0;
    const int64_t size[256] = {
        ['n'] = w->n, ['v'] = w->vocab, ['t'] = t->n_ids, ['s'] = t->n_sequences};
    st_entry entries[N_FIELDS];
    for (int i = 0; i < N_FIELDS; i++) entries[i] = entry_of(&fields[i], size);
    const char *metadata[] = {"format", FORMAT, "model", model_name, "words", words, NULL};
    int64_t word = sizeof(int32_t);
    if (!(w->codes = mem_array((size_t)w->vocab, KLD_ROWS * sizeof *w->codes, e))) return e->code;
    if (!(w->out = st_writer_open(path, entries, N_FIELDS, metadata, e))) return e->code;
    if (st_writer_put(w->out, IDS, 0, t->ids, t->n_ids * word, e) ||
        st_writer_put(w->out, TARGETS, 0, t->targets, t->n_ids * word, e) ||
        st_writer_put(w->out, LENGTHS, 0, t->lengths, t->n_sequences * word, e))
        return e->code;
    return ERR_NONE;
}

kld_writer *kld_writer_open(const char *path, int64_t vocab, const kld_texts *texts,
                            const char *model_name, const char *words, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    kld_writer *w = mem_array(1, sizeof *w, e);
    if (!w) return NULL;
    w->vocab = vocab;
    if (writer_into(w, path, texts, model_name, words, e)) {
        kld_writer_abort(w);
        return NULL;
    }
    return w;
}

void kld_writer_abort(kld_writer *w)
{
    if (!w) return;
    if (w->out) st_writer_abort(w->out);
    mem_free(w->codes);
    mem_free(w);
}

err_code kld_writer_finish(kld_writer *w, err_info *e)
{
    err_code code = st_writer_finish(w->out, e);
    w->out = NULL;
    kld_writer_abort(w);
    return code;
}

typedef struct encode_loop {
    const head *h;
    const int32_t *targets;
    int64_t vocab;
    uint16_t *codes;
    float step[KLD_ROWS], nll[KLD_ROWS];
    int32_t top[KLD_ROWS];
} encode_loop;

static void encode_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    encode_loop *l = ctx;
    for (int64_t r = begin; r < end; r++) {
        const float *x = l->h->logits + r * l->vocab;
        uint16_t *codes = l->codes + r * l->vocab;
        row_facts facts = look_at(x, l->vocab);
        double least = INFINITY;
        for (int64_t i = 0; i < l->vocab; i++) least = x[i] < least ? x[i] : least;
        l->step[r] = (float)((facts.log_z - least) / 65535);
        l->nll[r] = (float)(facts.log_z - x[l->targets[r]]);
        l->top[r] = facts.top;
        double per_step = l->step[r] > 0 ? 1.0 / (double)l->step[r] : 0;
        for (int64_t i = 0; isfinite(l->step[r]) && i < l->vocab; i++) {
            double c = (facts.log_z - x[i]) * per_step + 0.5;
            codes[i] = (uint16_t)(c < 65535 ? c : 65535);
        }
    }
}

static err_code put_rows(kld_writer *w, const encode_loop *l, int64_t n, err_info *e)
{
    for (int64_t r = 0; r < n; r++)
        if (!isfinite(l->step[r]) || !isfinite(l->nll[r]))
            return not_finite("the reference's", w->done + r, e);
    int64_t at = w->done * 4, row = w->vocab * 2;
    if (st_writer_put(w->out, LOGPROBS, w->done * row, l->codes, n * row, e) ||
        st_writer_put(w->out, STEP, at, l->step, n * 4, e) ||
        st_writer_put(w->out, NLL, at, l->nll, n * 4, e) ||
        st_writer_put(w->out, TOP, at, l->top, n * 4, e))
        return e->code;
    w->done += n;
    return ERR_NONE;
}

err_code kld_writer_put(kld_writer *w, model *m, const float *final, const int32_t *targets,
                        int64_t n, const cancel_flag *cancel, err_info *e)
{
    head h;
    int64_t H = m->config.hidden_size;
    if (m->config.vocab_size != w->vocab)
        return err_set(e, ERR_RANGE, "the file is for %lld tokens, the model has %d",
                       (long long)w->vocab, m->config.vocab_size);
    if (n > w->n - w->done)
        return err_set(e, ERR_RANGE, "more positions than the file has room for");
    err_code code = check_targets(targets, n, w->vocab, e);
    if (code) return code;
    code = head_open(&h, m, w->vocab, e);
    for (int64_t at = 0; !code && at < n; at += KLD_ROWS) {
        int64_t rows = n - at < KLD_ROWS ? n - at : KLD_ROWS;
        if (cancel_raised(cancel)) {
            code = err_set(e, ERR_CANCELLED, "interrupted");
            break;
        }
        encode_loop l = {.h = &h, .targets = targets + at, .vocab = w->vocab, .codes = w->codes};
        head_run(&h, final + at * H, rows);
        pool_for(m->pool, rows, 1, encode_rows, &l);
        code = put_rows(w, &l, rows, e);
    }
    head_close(&h);
    return code;
}

/* ---- comparing ------------------------------------------------------------------------------ */

typedef struct compare_loop {
    const head *p, *q;
    const kld_file *file; /* NULL: p's logits are there */
    const int32_t *targets;
    int64_t vocab, first; /* of this batch in the file */
    kld_result out;       /* from this batch on */
    const char **faults;  /* [KLD_ROWS] of rows of the file */
} compare_loop;

static void compare_rows(void *ctx, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    const compare_loop *l = ctx;
    const kld_result *out = &l->out;
    for (int64_t r = begin; r < end; r++) {
        float *x = l->p->logits + r * l->vocab, *y = l->q->logits + r * l->vocab;
        if (l->file) read_row(l->file, l->first + r, x);
        double difference;
        row_facts p = look_at_both(x, y, l->vocab, &difference), q = look_at(y, l->vocab);
        double kl = difference - (p.log_z - q.log_z);
        out->kl[r] = kl < 0 ? 0 : (float)kl; /* below 0 by rounding only; NaN stays */
        out->nll_p[r] = (float)(p.log_z - x[l->targets[r]]);
        out->nll_q[r] = (float)(q.log_z - y[l->targets[r]]);
        out->top_p[r] = p.top;
        out->top_q[r] = q.top;
        if (!l->file) continue;
        l->faults[r] = row_fault(l->file, l->first + r, x, &p, l->targets[r]);
        out->nll_p[r] = float_at(l->file->nll, l->first + r);
        out->top_p[r] = int_at(l->file->top, l->first + r);
    }
}

static kld_result result_from(const kld_result *out, int64_t at)
{
    return (kld_result){out->kl + at, out->nll_p + at, out->nll_q + at, out->top_p + at,
                        out->top_q + at};
}

static err_code check_finite(const kld_result *out, int64_t n, err_info *e)
{
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(out->nll_p[i])) return not_finite("the reference's", i, e);
        if (!isfinite(out->nll_q[i]) || !isfinite(out->kl[i]))
            return not_finite("the model's", i, e);
    }
    return ERR_NONE;
}

static err_code check_rows(const compare_loop *l, int64_t n, err_info *e)
{
    for (int64_t r = 0; l->file && r < n; r++)
        if (l->faults[r])
            return err_set(e, ERR_FORMAT, "%s: position %lld is damaged: %s",
                           l->file->logprobs->file, (long long)(l->first + r), l->faults[r]);
    return ERR_NONE;
}

static err_code check_compare(const kld_reference *p, const model *q, const int32_t *targets,
                              int64_t n, err_info *e)
{
    int64_t V = q->config.vocab_size, of_p = p->m ? p->m->config.vocab_size : p->file->vocab;
    if (of_p != V)
        return err_set(e, ERR_RANGE, "the reference has %lld tokens, the model %lld",
                       (long long)of_p, (long long)V);
    if (!p->m && (p->first < 0 || n > p->file->n - p->first))
        return err_set(e, ERR_RANGE,
                       "%lld positions from %lld on are not among the reference's %lld",
                       (long long)n, (long long)p->first, (long long)p->file->n);
    return check_targets(targets, n, V, e);
}

static err_code compare_batches(const kld_reference *p, const head *hp, const head *hq,
                                const float *final, const int32_t *targets, int64_t n,
                                const kld_result *out, const cancel_flag *cancel, err_info *e)
{
    int64_t V = hq->m->config.vocab_size, H = hq->m->config.hidden_size;
    for (int64_t at = 0; at < n; at += KLD_ROWS) {
        int64_t rows = n - at < KLD_ROWS ? n - at : KLD_ROWS;
        if (cancel_raised(cancel)) return err_set(e, ERR_CANCELLED, "interrupted");
        const char *faults[KLD_ROWS] = {0};
        compare_loop l = {
            hp,    hq, p->m ? NULL : p->file, targets + at, V, p->first + at, result_from(out, at),
            faults};
        if (p->m) head_run(hp, p->final + at * p->m->config.hidden_size, rows);
        head_run(hq, final + at * H, rows);
        pool_for(hq->m->pool, rows, 1, compare_rows, &l);
        if (check_rows(&l, rows, e)) return e->code;
        if (!p->m) map_forget(p->file->logprobs->data + l.first * V * 2, (size_t)(rows * V * 2));
    }
    return check_finite(out, n, e);
}

err_code kld_compare(const kld_reference *p, model *q, const float *final, const int32_t *targets,
                     int64_t n, const kld_result *out, const cancel_flag *cancel, err_info *e)
{
    err_info local;
    if (!e) e = &local;
    if (check_compare(p, q, targets, n, e)) return e->code;
    head hp = {0}, hq = {0};
    err_code code = head_open(&hp, p->m, q->config.vocab_size, e);
    if (p->m == q) hp.w = model_stored(q, hp.w);
    if (!code) code = head_open(&hq, q, q->config.vocab_size, e);
    if (!code) code = compare_batches(p, &hp, &hq, final, targets, n, out, cancel, e);
    head_close(&hp);
    head_close(&hq);
    return code;
}

void kld_difference(const float *p, const float *q, int64_t n, double *error, double *power)
{
    double e = 0, w = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)q[i] - (double)p[i];
        e += d * d;
        w += (double)p[i] * (double)p[i];
    }
    *error += e;
    *power += w;
}
