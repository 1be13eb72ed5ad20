package wire

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"

	"golang.org/x/crypto/curve25519"
)

// Key is a WireGuard key, private or public: a point or scalar of Curve25519.
// Private keys live in memory only and are made fresh by every process.
type Key [32]byte

// NewPrivateKey makes a private key from the system's randomness, clamped as
// RFC 7748 section 5 asks.
func NewPrivateKey() Key {
	var k Key
	_, _ = rand.Read(k[:]) // never fails (crypto/rand, Go 1.24)
	k[0] &= 248
	k[31] = k[31]&127 | 64
	return k
}

// ParseKey reads the base64 form that wg(8) prints.
func ParseKey(s string) (Key, error) {
	var k Key
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		return k, fmt.Errorf("parsing WireGuard key: %w", err)
	}
	if len(b) != len(k) {
		return k, fmt.Errorf("parsing WireGuard key: %d bytes instead of %d", len(b), len(k))
	}
	copy(k[:], b)
	return k, nil
}

// Public is the public key of private key k.
func (k Key) Public() Key {
	var p Key
	b, err := curve25519.X25519(k[:], curve25519.Basepoint)
	if err != nil {
		// Only a low-order point fails, and the base point is none.
		panic("wire: " + err.Error())
	}
	copy(p[:], b)
	return p
}

// String is the base64 form. Never log a private key.
func (k Key) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// IsZero tells whether k was never set.
func (k Key) IsZero() bool { return k == Key{} }
