/* framing: requests that are wrong by their sizes or lines, seen before libevent reads them.
 *
 * libevent 2.1 reads a body that is too large to its end, also one that never comes, before it says
 * so; it takes "-0" for the size of a chunk and ";" for none, keeps what comes instead of a size
 * whatever it grows to, and tells of all this only once it has written a reply. So what arrives is
 * looked at first: the lengths in heads, whose fields have one line each (RFC 9112, 5.2), what is
 * around chunks (7.1), and whether lines end where all see it. Extensions of these become what
 * libevent passes over. */
#ifndef NET_FRAMING_H
#define NET_FRAMING_H

#include <stddef.h>
#include <stdint.h>

enum net_framing_place {
    NET_IN_HEAD,
    NET_IN_SIZE,  /* the line before a chunk */
    NET_IN_CHUNK, /* its bytes */
    NET_IN_END,   /* the end of the line behind them */
    NET_IN_TRAILER,
    NET_IN_REST, /* of the request nothing more has to be looked at */
};

typedef struct net_framing { /* zeros: before a request */
    enum net_framing_place in;
    int has_begun;
    int is_chunked;
    int is_cr;     /* the byte before */
    uint64_t body; /* bytes of it that the head declares, or that the chunks so far have */
    uint64_t left; /* of the chunk */
    size_t n_line; /* of the line, of which the beginning is kept */
    char line[64];
} net_framing;

/* Follows the next bytes of a request, in which extensions are overwritten. The status with which
 * it is to be refused: 413 (a body of more than body_bytes), 400 (no field, where it is among
 * fields, or no chunk), or 0. */
int net_follow(net_framing *f, uint64_t body_bytes, char *bytes, size_t n_bytes);

/* In a head or a trailer. */
int net_is_among_fields(const net_framing *f);

/* Bytes of an empty line in front of a request, where it is passed over (RFC 9112, 2.2); -1 where
 * it takes more to tell. */
int net_empty_line(const char *bytes, size_t n_bytes);

#endif
