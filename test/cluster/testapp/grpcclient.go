package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// grpcResult is what became of one call, as the client saw it.
type grpcResult struct {
	Test     string      `json:"test"`
	Call     string      `json:"call"`
	Server   string      `json:"server"` // by the header, or else by the trailer
	Code     string      `json:"code"`
	Message  string      `json:"message,omitempty"`
	Sent     int         `json:"sent"` // messages
	Received int         `json:"received"`
	Header   metadata.MD `json:"header"`
	Trailer  metadata.MD `json:"trailer"`
	Seen     *called     `json:"seen,omitempty"` // what the server saw, of unary and client
	Took     float64     `json:"took_ms"`
	Gap      float64     `json:"gap_ms"` // the longest time between two messages that came
}

// rpc makes one call of gRPC: unary, server, client or both.
func rpc(args []string) error {
	if len(args) < 2 {
		return errors.New("no address and call, unary, server, client or both, given")
	}
	addr, call := args[0], args[1]
	f := flag.NewFlagSet("grpc", flag.ContinueOnError)
	var add headers
	f.Var(&add, "header", "NAME:VALUE, several times")
	count := f.Int("count", 10, "messages of a stream")
	size := f.Int("size", 64, "bytes of a message")
	every := f.Duration("every", 0, "time between two of them")
	deadline := f.Duration("deadline", 30*time.Second, "for all of it")
	authority := f.String("authority", "", "authority (default: the address)")
	if err := f.Parse(args[2:]); err != nil {
		return err
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}), grpc.MaxCallRecvMsgSize(64<<20))}
	if *authority != "" {
		options = append(options, grpc.WithAuthority(*authority))
	}
	c, err := grpc.NewClient("passthrough:///"+addr, options...)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), *deadline)
	defer cancel()
	for _, kv := range add {
		ctx = metadata.AppendToOutgoingContext(ctx, kv[0], kv[1])
	}
	r := &grpcResult{Test: "grpc", Call: call}
	p := &pacer{count: *count, every: *every, message: bytes.Repeat([]byte("culvert "), *size/8+1)[:*size]}
	begun := time.Now()
	err = r.make(ctx, c, p)
	r.Took = ms(time.Since(begun))
	s, _ := status.FromError(err)
	r.Code, r.Message = s.Code().String(), s.Message()
	for _, md := range []metadata.MD{r.Trailer, r.Header} {
		if v := md.Get(servedBy); len(v) > 0 {
			r.Server = v[0]
		}
	}
	text := fmt.Sprintf("grpc %s: %s from %s, %d sent, %d received, %.1f ms %s", call, r.Code, r.Server, r.Sent, r.Received, r.Took, r.Message)
	if err := report(text, r); err != nil {
		return err
	}
	if s.Code() != codes.OK {
		return err
	}
	return nil
}

// pacer is what a client sends.
type pacer struct {
	count   int
	every   time.Duration
	message []byte
}

// make makes the call. One kind of stream does for all of them.
func (r *grpcResult) make(ctx context.Context, c *grpc.ClientConn, p *pacer) (err error) {
	desc := map[string]grpc.StreamDesc{
		"unary": {StreamName: "Unary"}, "server": {StreamName: "Server", ServerStreams: true},
		"client": {StreamName: "Client", ClientStreams: true}, "both": {StreamName: "Both", ServerStreams: true, ClientStreams: true},
	}[r.Call]
	if desc.StreamName == "" {
		return fmt.Errorf("%q is none of unary, server, client and both", r.Call)
	}
	s, err := c.NewStream(ctx, &desc, "/"+echoService+"/"+desc.StreamName)
	if err != nil {
		return err
	}
	defer func() {
		r.Trailer = s.Trailer()
		r.Header, _ = s.Header() // what went wrong is known
	}()
	first, n := p.message, p.count
	switch r.Call {
	case "unary":
		n = 1
	case "server":
		first, n = fmt.Appendf(nil, "%d %v", p.count, p.every), 1
	}
	last := time.Now()
	receive := func() error {
		var b []byte
		if err := s.RecvMsg(&b); err != nil {
			return err
		}
		r.Received++
		r.Gap = max(r.Gap, ms(time.Since(last)))
		last = time.Now()
		switch {
		case !desc.ServerStreams:
			r.Seen = &called{}
			return json.Unmarshal(b, r.Seen)
		case r.Call == "both" && !bytes.Equal(b, p.message):
			return fmt.Errorf("another message came back: %d bytes of %d", len(b), len(p.message))
		case r.Call == "server" && !strings.HasSuffix(string(b), fmt.Sprintf(" %d", r.Received-1)):
			return fmt.Errorf("message %d is %q", r.Received-1, b)
		}
		return nil
	}
	for i := range n {
		if i > 0 {
			time.Sleep(p.every)
		}
		if err := s.SendMsg(&first); err != nil {
			if errors.Is(err, io.EOF) {
				break // the status tells why
			}
			return err
		}
		r.Sent++
		if r.Call == "both" {
			if err := receive(); err != nil {
				return err
			}
		}
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	for {
		if err := receive(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if !desc.ServerStreams {
			return nil
		}
	}
}
