package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// wsResult is what became of some WebSockets.
type wsResult struct {
	Test        string         `json:"test"`
	Connections int            `json:"connections"`
	Servers     map[string]int `json:"servers"` // connections, by who answered
	Messages    int            `json:"messages"`
	Open        float64        `json:"open_s"` // until all were open
	P50         float64        `json:"p50_ms"` // of a message and its echo
	P99         float64        `json:"p99_ms"`
	Max         float64        `json:"max_ms"`

	mu  sync.Mutex
	all []time.Duration
}

// ws opens WebSockets, has messages echoed on each, and again after a pause.
func ws(args []string) error {
	url, err := word(args, 0, "URL")
	if err != nil {
		return err
	}
	f := flag.NewFlagSet("ws", flag.ContinueOnError)
	var add headers
	f.Var(&add, "header", "NAME:VALUE, several times")
	conns := f.Int("conns", 1, "WebSockets at once")
	count := f.Int("count", 10, "messages on each")
	size := f.Int("size", 64, "bytes of a message")
	every := f.Duration("every", 0, "time between two of them")
	hold := f.Duration("hold", 0, "how long all are left alone, before one more message on each")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	r := &wsResult{Test: "ws", Connections: *conns, Servers: map[string]int{}}
	cs := make([]*websocket.Conn, *conns)
	defer func() {
		for _, c := range cs {
			if c != nil {
				c.Close()
			}
		}
	}()
	begun := time.Now()
	// each runs f for every connection, several at once.
	each := func(f func(i int) error) error {
		failed := make([]error, *conns)
		var wg sync.WaitGroup
		for w := range min(dialers, *conns) {
			wg.Go(func() {
				for i := w; i < *conns; i += dialers {
					failed[i] = f(i)
				}
			})
		}
		wg.Wait()
		for i, err := range failed {
			if err != nil {
				return fmt.Errorf("WebSocket %d of %d: %w", i+1, *conns, err)
			}
		}
		return nil
	}
	if err := each(func(i int) (err error) { cs[i], err = r.open(url, add); return err }); err != nil {
		return err
	}
	r.Open = time.Since(begun).Seconds()
	message := bytes.Repeat([]byte("culvert "), *size/8+1)[:*size]
	err = each(func(i int) error {
		for n := range *count {
			if n > 0 {
				time.Sleep(*every)
			}
			if err := r.trip(cs[i], message); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && *hold > 0 {
		time.Sleep(*hold)
		err = each(func(i int) error { return r.trip(cs[i], message) })
	}
	if err == nil {
		err = each(func(i int) error { return farewell(cs[i]) })
	}
	if err != nil {
		return err
	}
	slices.Sort(r.all)
	if n := len(r.all); n > 0 {
		r.Messages, r.P50, r.P99, r.Max = n, ms(r.all[n/2]), ms(r.all[n*99/100]), ms(r.all[n-1])
	}
	return report(fmt.Sprintf("ws: %d WebSocket(s) to %v, %d messages, p50 %.2f ms p99 %.2f ms", r.Connections, r.Servers, r.Messages, r.P50, r.P99), r)
}

func (r *wsResult) open(url string, add headers) (*websocket.Conn, error) {
	d := websocket.Dialer{HandshakeTimeout: 30 * time.Second, ReadBufferSize: 1 << 10, WriteBufferSize: 1 << 10, Subprotocols: []string{"testapp"}}
	c, answer, err := d.Dial(url, add.header())
	if err != nil {
		if answer != nil {
			err = fmt.Errorf("%w: %s", err, answer.Status)
		}
		return nil, err
	}
	if c.Subprotocol() != "testapp" {
		return c, fmt.Errorf("the subprotocol is %q", c.Subprotocol())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Servers[answer.Header.Get(servedBy)]++
	return c, nil
}

// trip has a message echoed.
func (r *wsResult) trip(c *websocket.Conn, message []byte) error {
	begun := time.Now()
	c.SetReadDeadline(begun.Add(30 * time.Second))
	c.SetWriteDeadline(begun.Add(30 * time.Second))
	if err := c.WriteMessage(websocket.BinaryMessage, message); err != nil {
		return err
	}
	kind, b, err := c.ReadMessage()
	if err != nil {
		return err
	}
	if kind != websocket.BinaryMessage || !bytes.Equal(b, message) {
		return fmt.Errorf("another message came back: %d bytes of %d", len(b), len(message))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, time.Since(begun))
	return nil
}

// farewell closes as the protocol has it: the other end says goodbye, too.
func farewell(c *websocket.Conn) error {
	end := time.Now().Add(10 * time.Second)
	c.SetReadDeadline(end)
	if err := c.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), end); err != nil {
		return err
	}
	_, _, err := c.ReadMessage()
	var closed *websocket.CloseError
	if !errors.As(err, &closed) || closed.Code != websocket.CloseNormalClosure {
		return fmt.Errorf("it was not closed normally: %w", err)
	}
	return nil
}
