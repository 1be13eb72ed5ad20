package carrier

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/wire/queue"
)

// ProxyPort is the TCP port on the addresses of its pod where the agent takes
// streams that the API server's pods/proxy leads there. It opens once a session
// was introduced, and speaks to nobody but that session.
const ProxyPort = 7533

// ProxyUpgrade is the protocol that a request to ProxyPort asks for in its
// Upgrade header; after the 101 come raw bytes.
const ProxyUpgrade = "culvert"

// SecretLen is the length in bytes of the secret that the agent gives away in
// its Welcome, and of the nonces of both ends.
const SecretLen = 32

const (
	// maxRequest bounds the request's head: an API server's proxy forwards what
	// the client sent (less than 1 KiB) and adds a few lines.
	maxRequest = 8 << 10
	proofLen   = sha256.Size
)

// The two ends' proofs differ, so that neither can be sent back to its maker.
const (
	proofOfSession = "culvert proxy 2, session\x00"
	proofOfAgent   = "culvert proxy 2, agent\x00"
)

// ErrProof tells that the other end does not know the secret: a stranger, or an
// agent or session process that was replaced.
var ErrProof = errors.New("the other end does not know the secret")

// NewSecret makes a secret for Welcome.ProxySecret.
func NewSecret() []byte {
	b := make([]byte, SecretLen)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	return b
}

func proof(secret []byte, of string, lane queue.Lane, agentNonce, sessionNonce []byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write([]byte(of))
	h.Write([]byte{byte(lane)})
	h.Write(agentNonce)
	h.Write(sessionNonce)
	return h.Sum(nil)
}

// Prove is the session's end of a connection that was just upgraded: it proves
// the secret that the agent gave away when it was introduced, and has the agent
// do the same. The stream is for the lane. No introduction follows. The way from the API server to the pod is
// plain HTTP, and whoever sits on it could exchange the keys in an introduction;
// as it is, he sees nothing but encrypted packets. It takes ownership of c.
// Errors are ErrProof, the context's or those of c.
func Prove(ctx context.Context, c net.Conn, secret []byte, lane queue.Lane) (*Stream, error) {
	s := newStream(c)
	s.lane = lane
	err := s.introduce(ctx, func() error {
		var nonce [SecretLen]byte
		if _, err := io.ReadFull(c, nonce[:]); err != nil {
			return fmt.Errorf("reading the agent's nonce: %w", err)
		}
		mine, begun := NewSecret(), time.Now()
		if _, err := c.Write(slices.Concat(mine, []byte{byte(lane)}, proof(secret, proofOfSession, lane, nonce[:], mine))); err != nil {
			return fmt.Errorf("writing the proof: %w", err)
		}
		var theirs [proofLen]byte
		if _, err := io.ReadFull(c, theirs[:]); err != nil {
			return fmt.Errorf("reading the agent's proof: %w", err)
		}
		if !hmac.Equal(theirs[:], proof(secret, proofOfAgent, lane, nonce[:], mine)) {
			return ErrProof
		}
		s.rtt.Store(int64(time.Since(begun)))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Verify is the agent's end of Prove, from the HTTP request on. Until the other
// end has proved itself it costs one goroutine and less than 32 KiB, and is told
// nothing but a nonce. It takes ownership of c.
func Verify(ctx context.Context, c net.Conn, secret []byte) (*Stream, error) {
	s := newStream(c)
	err := s.introduce(ctx, func() error {
		if err := readUpgrade(c); err != nil {
			return err
		}
		nonce := NewSecret()
		hello := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + ProxyUpgrade + "\r\n\r\n"
		if _, err := c.Write(append([]byte(hello), nonce...)); err != nil {
			return fmt.Errorf("answering the upgrade: %w", err)
		}
		var got [SecretLen + 1 + proofLen]byte
		if _, err := io.ReadFull(c, got[:]); err != nil {
			return fmt.Errorf("reading the session's proof: %w", err)
		}
		theirs, lane := got[:SecretLen], queue.Lane(got[SecretLen])
		if len(secret) != SecretLen || !hmac.Equal(got[SecretLen+1:], proof(secret, proofOfSession, lane, nonce, theirs)) {
			return ErrProof
		}
		if s.lane = lane; lane >= queue.Lanes {
			return fmt.Errorf("there is no lane %d", lane)
		}
		if _, err := c.Write(proof(secret, proofOfAgent, lane, nonce, theirs)); err != nil {
			return fmt.Errorf("writing the proof: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// readUpgrade reads a request for ProxyUpgrade and nothing after it.
func readUpgrade(c net.Conn) error {
	r := bufio.NewReaderSize(io.LimitReader(c, maxRequest), 1<<10)
	req, err := http.ReadRequest(r)
	if err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	switch {
	case req.Method != http.MethodGet || !strings.EqualFold(req.Header.Get("Upgrade"), ProxyUpgrade):
		return errors.New("the request asks for no upgrade to " + ProxyUpgrade)
	case r.Buffered() > 0 || req.ContentLength != 0:
		return errors.New("bytes before the upgrade was answered")
	}
	return nil
}
