/* SHA-256 of two messages side by side: see sha256.c. */
#ifndef DORA_EXPORT_SHA256_H
#define DORA_EXPORT_SHA256_H

#include <stddef.h>
#include <stdint.h>

/* Takes so many blocks of 64 bytes of two messages into their states; either may have none. */
void sha256_two(uint32_t *states[2], const uint8_t *data[2], const ptrdiff_t counts[2]);

/* Whether the processor has what it takes. */
int sha256_usable(void);

#endif
