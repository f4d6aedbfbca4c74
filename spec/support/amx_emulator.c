/* AMX for machines without it, linked into the module that specs load from build/amx.
 *
 * The linker hands calls of cpu_detect to __wrap_cpu_detect here, which says that there are tiles
 * where there is AVX-512 with BF16, as all that have tiles do. Tile instructions then end in
 * SIGILL, whose handler computes what they would have and steps over them; what is no tile
 * instruction, or one that the processor would refuse in its state, ends the process as ever.
 *
 * Encodings, conditions and results are those of Intel's SDM: volume 2, chapters 4 and 5
 * (LDTILECFG, TDPBSSD and so on, TILELOADD, TILERELEASE, TILESTORED, TILEZERO), and volume 1,
 * chapter 18. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "base/cpu.h"

enum { N_TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64 };

typedef struct tile {
    int rows, row_bytes;
    uint8_t data[MAX_ROWS][MAX_BYTES];
} tile;

/* Of a thread. `in_use` is what the kernel would have to save. */
typedef struct tile_state {
    int in_use;
    tile tiles[N_TILES];
} tile_state;

static _Thread_local tile_state state;

/* ---- decoding ------------------------------------------------------------------------------- */

/* A VEX instruction of map 0F38; prefix is 0 none, 1 66, 2 F3, 3 F2. */
typedef struct instruction {
    int opcode, prefix, reg, vvvv, mod, rm;
    uint64_t address; /* of a memory operand, without its index */
    int64_t stride;   /* the scaled index */
    int has_sib;
    uint64_t next;
} instruction;

static uint64_t register_value(const ucontext_t *c, int number)
{
    static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)c->uc_mcontext.gregs[names[number]];
}

static int64_t displacement(const uint8_t *p, int n_bytes)
{
    int32_t wide;
    memcpy(&wide, p, 4);
    return n_bytes == 1 ? (int8_t)*p : n_bytes == 4 ? wide : 0;
}

/* What follows an opcode. Bits R, X and B of the prefix are stored inverted. */
static void decode_operands(const ucontext_t *c, const uint8_t *p, int vex, instruction *in)
{
    int high_base = vex & 0x20 ? 0 : 8, high_index = vex & 0x40 ? 0 : 8;
    in->mod = *p >> 6;
    in->reg = (*p >> 3 & 7) | (vex & 0x80 ? 0 : 8);
    in->rm = (*p++ & 7) | high_base;
    if (in->mod == 3) {
        in->next = (uint64_t)p;
        return;
    }
    int base = in->rm, has_base = 1, n_bytes = in->mod == 1 ? 1 : in->mod == 2 ? 4 : 0;
    in->has_sib = (in->rm & 7) == 4;
    if (in->has_sib) {
        int sib = *p++, index = (sib >> 3 & 7) | high_index;
        base = (sib & 7) | high_base;
        if (index != 4) in->stride = (int64_t)(register_value(c, index) << (sib >> 6));
    }
    if (in->mod == 0 && (base & 7) == 5) {
        has_base = 0;
        n_bytes = 4;
    }
    in->address = (uint64_t)displacement(p, n_bytes);
    in->next = (uint64_t)p + (uint64_t)n_bytes;
    if (has_base) in->address += register_value(c, base);
    if (!has_base && !in->has_sib) in->address += in->next;
}

/* Whether it is VEX.128.0F38.W0 at all. */
static int decode(const ucontext_t *c, instruction *in)
{
    const uint8_t *p = (const uint8_t *)c->uc_mcontext.gregs[REG_RIP];
    *in = (instruction){0};
    if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) return 0;
    in->prefix = p[2] & 3;
    in->vvvv = ~p[2] >> 3 & 15;
    in->opcode = p[3];
    decode_operands(c, p + 4, p[1], in);
    return 1;
}

/* ---- instructions: 0 where the processor raises #UD or #GP ----------------------------------- */

static tile *configured(int number)
{
    if (!state.in_use || number >= N_TILES) return NULL;
    return state.tiles[number].rows ? &state.tiles[number] : NULL;
}

static int load_config(const uint8_t *bytes)
{
    uint16_t row_bytes;
    state = (tile_state){0};
    if (bytes[0] == 0) return 1;
    if (bytes[0] != 1) return 0;
    for (int i = 2; i < 16; i++)
        if (bytes[i]) return 0;
    for (int i = 0; i < 16; i++) {
        memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        int rows = bytes[48 + i];
        if (row_bytes > MAX_BYTES || rows > MAX_ROWS || !row_bytes != !rows) return 0;
        if (i >= N_TILES) {
            if (rows) return 0;
            continue;
        }
        state.tiles[i].rows = rows;
        state.tiles[i].row_bytes = row_bytes;
    }
    state.in_use = 1;
    return 1;
}

static int zero(tile *t)
{
    if (!t) return 0;
    memset(t->data, 0, sizeof t->data);
    return 1;
}

static int load(tile *t, const instruction *in)
{
    if (!zero(t) || !in->has_sib) return 0;
    for (int r = 0; r < t->rows; r++)
        memcpy(t->data[r], (const void *)(in->address + (uint64_t)(r * in->stride)),
               (size_t)t->row_bytes);
    return 1;
}

static int store(const tile *t, const instruction *in)
{
    if (!t || !in->has_sib) return 0;
    for (int r = 0; r < t->rows; r++)
        memcpy((void *)(in->address + (uint64_t)(r * in->stride)), t->data[r],
               (size_t)t->row_bytes);
    return 1;
}

static int byte_of(uint8_t byte, int is_signed)
{
    return is_signed ? (int8_t)byte : byte;
}

/* c += a b, four bytes of a row of a with four of a column of b. Sums wrap. */
static int dot(tile *c, const tile *a, const tile *b, int a_signed, int b_signed)
{
    if (!c || !a || !b || c == a || c == b || a == b) return 0;
    if (c->row_bytes % 4 || a->row_bytes % 4 || b->row_bytes % 4) return 0;
    if (a->rows != c->rows || b->rows != a->row_bytes / 4 || b->row_bytes != c->row_bytes) return 0;
    for (int m = 0; m < c->rows; m++)
        for (int n = 0; n < c->row_bytes / 4; n++) {
            uint32_t sum;
            memcpy(&sum, c->data[m] + 4 * n, 4);
            for (int k = 0; k < a->row_bytes; k++)
                sum += (uint32_t)(byte_of(a->data[m][k], a_signed) *
                                  byte_of(b->data[k / 4][4 * n + k % 4], b_signed));
            memcpy(c->data[m] + 4 * n, &sum, 4);
        }
    return 1;
}

static int is_none(int vvvv)
{
    return vvvv == 0;
}

static int run(const instruction *in)
{
    int to_registers = in->mod == 3;
    switch (in->opcode << 4 | in->prefix << 1 | to_registers) {
    case 0x490: return is_none(in->vvvv) && in->reg == 0 && load_config((void *)in->address);
    case 0x491: state = (tile_state){0}; return is_none(in->vvvv) && in->reg == 0 && in->rm == 0;
    case 0x497: return is_none(in->vvvv) && in->rm == 0 && zero(configured(in->reg));
    case 0x4b6: return is_none(in->vvvv) && load(configured(in->reg), in);
    case 0x4b4: return is_none(in->vvvv) && store(configured(in->reg), in);
    case 0x5e1:
    case 0x5e3:
    case 0x5e5:
    case 0x5e7: /* BUUD, BUSD, BSUD, BSSD */
        return dot(configured(in->reg), configured(in->rm), configured(in->vvvv), in->prefix >> 1,
                   in->prefix & 1);
    default: return 0;
    }
}

static void on_illegal(int signal_number, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    instruction in;
    (void)info;
    if (decode(c, &in) && run(&in))
        c->uc_mcontext.gregs[REG_RIP] = (greg_t)in.next;
    else
        signal(signal_number, SIG_DFL); /* the instruction comes again */
}

/* ---- detection ------------------------------------------------------------------------------ */

cpu_level __real_cpu_detect(void);
cpu_level __wrap_cpu_detect(void);

/* Called before kernels are chosen, so between products: no tiles may be in use then. */
cpu_level __wrap_cpu_detect(void)
{
    cpu_level level = __real_cpu_detect();
    if (state.in_use) {
        fputs("amx_emulator: a product has left its tiles configured\n", stderr);
        abort();
    }
    if (level != CPU_AVX512_BF16) return level;
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
    return sigaction(SIGILL, &action, NULL) == 0 ? CPU_AMX : level;
}
