package carrier

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"github.com/culvert-dev/culvert/wire/queue"
)

// door runs Verify for one connection after another, as the agent does, and
// sends what it makes of them.
func door(t *testing.T, secret []byte, within time.Duration) (addr string, made <-chan any) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan any, 16)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), within)
				defer cancel()
				if s, err := Verify(ctx, c, secret); err != nil {
					out <- err
				} else {
					out <- s
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
		close(out)
		for x := range out {
			if s, ok := x.(*Stream); ok {
				s.Close()
			}
		}
	})
	return l.Addr().String(), out
}

// knock sends an upgrade request as the API server would forward it and reads
// the answer's head; what follows it is in the reader.
func knock(t *testing.T, addr, request string) (net.Conn, *bufio.Reader, *http.Response) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return c, r, nil
	}
	return c, r, resp
}

const goodRequest = "GET /api/v1/x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: culvert\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n"

// upgraded is a connection behind its 101.
type upgraded struct {
	net.Conn
	r *bufio.Reader
}

func (u upgraded) Read(p []byte) (int, error) { return u.r.Read(p) }

func TestProof(t *testing.T) {
	leaks(t)
	secret := NewSecret()
	addr, made := door(t, secret, 5*time.Second)

	c, r, resp := knock(t, addr, goodRequest)
	if resp == nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != ProxyUpgrade {
		t.Fatalf("answered %+v", resp)
	}
	s, err := Prove(context.Background(), upgraded{c, r}, secret, queue.Sparse)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	theirs, ok := (<-made).(*Stream)
	if !ok {
		t.Fatal("the agent has no stream")
	}
	defer theirs.Close()
	_ = c.SetDeadline(time.Time{})
	if _, err := s.write([][]byte{[]byte("packet")}); err != nil {
		t.Fatal(err)
	}
	msgs, sizes := [][]byte{make([]byte, 100)}, make([]int, 1)
	if n, err := theirs.read(msgs, sizes); n != 1 || err != nil || string(msgs[0][:sizes[0]]) != "packet" {
		t.Fatalf("%d, %v, %q", n, err, msgs[0][:sizes[0]])
	}

	// Another secret.
	c, r, _ = knock(t, addr, goodRequest)
	if _, err := Prove(context.Background(), upgraded{c, r}, NewSecret(), queue.Sparse); err == nil {
		t.Error("another secret was proof")
	}
	if err, ok := (<-made).(error); !ok || !errors.Is(err, ErrProof) {
		t.Errorf("another secret: %v", err)
	}
}

func TestProofReplayed(t *testing.T) {
	leaks(t)
	secret := NewSecret()
	addr, made := door(t, secret, 5*time.Second)
	_, r, _ := knock(t, addr, goodRequest)
	nonce := make([]byte, SecretLen)
	if _, err := io.ReadFull(r, nonce); err != nil {
		t.Fatal(err)
	}
	recorded := append([]byte{}, make([]byte, SecretLen)...)
	recorded = append(recorded, byte(queue.Sparse))
	recorded = append(recorded, proof(secret, proofOfSession, queue.Sparse, nonce, recorded[:SecretLen])...)

	for name, bytes := range map[string][]byte{
		"replayed": recorded,
		"zero":     make([]byte, len(recorded)),
	} {
		c, r, _ := knock(t, addr, goodRequest)
		if _, err := c.Write(bytes); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(r, make([]byte, SecretLen)); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%s: the agent said something", name)
		}
		if err, ok := (<-made).(error); !ok || !errors.Is(err, ErrProof) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// The agent's own proof, sent back to it, is none of the session's.
	c, r, _ := knock(t, addr, goodRequest)
	if _, err := io.ReadFull(r, nonce); err != nil {
		t.Fatal(err)
	}
	mine := make([]byte, SecretLen)
	if _, err := c.Write(slices.Concat(mine, []byte{byte(queue.Sparse)}, proof(secret, proofOfAgent, queue.Sparse, nonce, mine))); err != nil {
		t.Fatal(err)
	}
	if err, ok := (<-made).(error); !ok || !errors.Is(err, ErrProof) {
		t.Errorf("reflected: %v", err)
	}
}

// TestAgentProves: a session is not taken in by who only pretends to be the agent.
func TestAgentProves(t *testing.T) {
	leaks(t)
	a, b := net.Pipe()
	go func() {
		_, _ = b.Write(make([]byte, SecretLen))
		_, _ = io.ReadFull(b, make([]byte, SecretLen+1+proofLen))
		_, _ = b.Write(make([]byte, proofLen))
		_, _ = io.Copy(io.Discard, b)
	}()
	if _, err := Prove(context.Background(), a, NewSecret(), queue.Sparse); !errors.Is(err, ErrProof) {
		t.Errorf("a stranger is the agent: %v", err)
	}
}

func TestStrangersGetNothing(t *testing.T) {
	leaks(t)
	addr, made := door(t, NewSecret(), 300*time.Millisecond)
	for name, request := range map[string]string{
		"plain GET":          "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"another upgrade":    strings.ReplaceAll(goodRequest, "Upgrade: culvert", "Upgrade: websocket"),
		"POST":               strings.Replace(goodRequest, "GET", "POST", 1),
		"bytes too early":    goodRequest + "hello",
		"no HTTP":            "\x00\x01\x02\r\n\r\n",
		"endless head":       "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 64<<10),
		"a head never ended": "GET / HTTP/1.1\r\nHost: a\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			begun := time.Now()
			if _, _, resp := knock(t, addr, request); resp != nil {
				t.Errorf("answered with %s", resp.Status)
			}
			if _, ok := (<-made).(error); !ok {
				t.Error("a stream was made")
			}
			if d := time.Since(begun); d > 3*time.Second {
				t.Errorf("held for %v", d)
			}
		})
	}
}

// TestNoSecretNoDoor: before the session has a secret nobody proves anything,
// also not that he knows an empty one.
func TestNoSecretNoDoor(t *testing.T) {
	leaks(t)
	addr, made := door(t, nil, 5*time.Second)
	c, r, _ := knock(t, addr, goodRequest)
	if _, err := Prove(context.Background(), upgraded{c, r}, nil, queue.Sparse); err == nil {
		t.Error("the empty secret was proof")
	}
	if _, ok := (<-made).(error); !ok {
		t.Error("a stream was made")
	}
}

// TestMove: while two Binds send without pause, they change from one stream to
// the next, and every message arrives, once and in order.
func TestMove(t *testing.T) {
	leaks(t)
	a, b := NewBind(BindConfig{}), NewBind(BindConfig{})
	fa, fb := open(t, a), open(t, b)
	s, g := pair(t, false)
	a.Attach(s)
	b.Attach(g)

	const total = 20000
	send := func(bind *Bind) {
		for i := 0; i < total; {
			batch := make([][]byte, 0, 20)
			for range min(20, total-i) {
				m := make([]byte, 1000)
				binary.BigEndian.PutUint32(m, uint32(i))
				batch = append(batch, m)
				i++
			}
			if err := bind.Send(batch, &bind.ep); err != nil {
				t.Error(err)
				return
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { send(a) })
	wg.Go(func() { send(b) })
	for _, fn := range []conn.ReceiveFunc{fa, fb} {
		wg.Go(func() {
			msgs, sizes, eps := make([][]byte, 32), make([]int, 32), make([]conn.Endpoint, 32)
			for i := range msgs {
				msgs[i] = make([]byte, 2000)
			}
			for want := uint32(0); want < total; {
				n, err := fn(msgs, sizes, eps)
				if err != nil {
					t.Error(err)
					return
				}
				for _, m := range msgs[:n] {
					if got := binary.BigEndian.Uint32(m); got != want {
						t.Errorf("message %d after %d", got, want)
						return
					}
					want++
				}
			}
		})
	}
	for range 3 {
		time.Sleep(10 * time.Millisecond)
		s, g := pair(t, false)
		b.Move(g)
		a.Move(s)
		time.Sleep(50 * time.Millisecond)
	}
	// What was lost is waited for in vain: the end of the Binds ends that.
	hung := time.AfterFunc(30*time.Second, func() { a.Shutdown(); b.Shutdown() })
	wg.Wait()
	if !hung.Stop() {
		t.Error("messages are missing")
	}
	for _, bind := range []*Bind{a, b} {
		if st := bind.Stats(); st.Dropped != 0 || st.Streams != 4 {
			t.Errorf("%+v", st)
		}
	}
}

// TestMoveFromADeadStream: the old stream says nothing, so what comes by the new
// one waits a moment, and only that.
func TestMoveFromADeadStream(t *testing.T) {
	leaks(t)
	a := NewBind(BindConfig{})
	fn := open(t, a)
	s, _ := pair(t, false)
	a.Attach(s)
	next, other := pair(t, false)
	got := make(chan error, 1)
	go func() {
		_, err := receive(fn)
		got <- err
	}()
	time.Sleep(50 * time.Millisecond)
	a.Move(next)
	if _, err := other.write([][]byte{[]byte("packet")}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(drainFor + 3*time.Second):
		t.Error("the new stream is not read")
	}
	if !errors.Is(s.Err(), ErrReplaced) {
		t.Errorf("the old stream: %v", s.Err())
	}
}
