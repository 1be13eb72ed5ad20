package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// echoService is the gRPC service: its methods take and give bytes as they are.
const echoService = "testapp.Echo"

// Headers by which a client of gRPC asks for trouble.
const (
	failHeader = "x-fail" // a status code, in numbers
	waitHeader = "x-wait" // a duration before anything is sent
)

// rawCodec leaves messages alone. It has the name of the usual codec, and so the
// usual content type.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("a message is bytes, not %T", v)
	}
	return *b, nil
}

func (rawCodec) Unmarshal(data []byte, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("a message is bytes, not %T", v)
	}
	*b = append([]byte(nil), data...)
	return nil
}

// grpcServer has one method for each kind of call.
func (a *app) grpcServer() *grpc.Server {
	s := grpc.NewServer(grpc.ForceServerCodec(rawCodec{}), grpc.MaxRecvMsgSize(64<<20))
	stream := func(name string, client, server bool, f func(grpc.ServerStream) (int, error)) grpc.StreamDesc {
		return grpc.StreamDesc{StreamName: name, ClientStreams: client, ServerStreams: server, Handler: func(_ any, s grpc.ServerStream) error {
			return a.call(s, f)
		}}
	}
	s.RegisterService(&grpc.ServiceDesc{ServiceName: echoService, Streams: []grpc.StreamDesc{
		stream("Unary", false, false, a.unary),
		stream("Server", false, true, a.serverStream),
		stream("Client", true, false, a.clientStream),
		stream("Both", true, true, a.bothStream),
	}}, nil)
	return s
}

// call is what all calls have in common: who answers stands in the header and,
// with the number of messages that came, in the trailer.
func (a *app) call(s grpc.ServerStream, f func(grpc.ServerStream) (int, error)) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	name := metadata.Pairs(servedBy, a.name)
	s.SetTrailer(name)
	first := func(key string) string {
		if v := md.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	if d, err := time.ParseDuration(first(waitHeader)); err == nil {
		select {
		case <-s.Context().Done():
			return status.FromContextError(s.Context().Err()).Err()
		case <-time.After(d):
		}
	}
	if code, err := strconv.Atoi(first(failHeader)); err == nil {
		return status.Error(codes.Code(code), "as was asked for")
	}
	if err := s.SendHeader(name); err != nil {
		return err
	}
	n, err := f(s)
	s.SetTrailer(metadata.Pairs("x-count", strconv.Itoa(n)))
	return err
}

// called is what a server of gRPC knows of a call.
type called struct {
	Server    string      `json:"server"`
	Authority string      `json:"authority"`
	Metadata  metadata.MD `json:"metadata"`
	Deadline  float64     `json:"deadline_ms"` // until then; 0: none
	Messages  int         `json:"messages"`
	Bytes     int         `json:"bytes"`
}

func (a *app) called(ctx context.Context) called {
	md, _ := metadata.FromIncomingContext(ctx)
	c := called{Server: a.name, Metadata: md, Authority: strings.Join(md.Get(":authority"), ",")}
	if end, ok := ctx.Deadline(); ok {
		c.Deadline = ms(time.Until(end))
	}
	return c
}

func sendJSON(s grpc.ServerStream, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.SendMsg(&b)
}

func (a *app) unary(s grpc.ServerStream) (int, error) {
	var b []byte
	if err := s.RecvMsg(&b); err != nil {
		return 0, err
	}
	c := a.called(s.Context())
	c.Messages, c.Bytes = 1, len(b)
	return 1, sendJSON(s, c)
}

// serverStream answers a message "N EVERY" with N messages at that interval.
func (a *app) serverStream(s grpc.ServerStream) (int, error) {
	var b []byte
	if err := s.RecvMsg(&b); err != nil {
		return 0, err
	}
	number, interval, _ := strings.Cut(string(b), " ")
	n, err := strconv.Atoi(number)
	if err != nil {
		return 1, status.Errorf(codes.InvalidArgument, "%q is no number", number)
	}
	every, _ := time.ParseDuration(interval) // none: at once
	for i := range n {
		if i > 0 {
			time.Sleep(every)
		}
		out := fmt.Appendf(nil, "%s %d", a.name, i)
		if err := s.SendMsg(&out); err != nil {
			return 1, err
		}
	}
	return 1, nil
}

func (a *app) clientStream(s grpc.ServerStream) (int, error) {
	c := a.called(s.Context())
	for {
		var b []byte
		err := s.RecvMsg(&b)
		if errors.Is(err, io.EOF) {
			return c.Messages, sendJSON(s, c)
		}
		if err != nil {
			return c.Messages, err
		}
		c.Messages++
		c.Bytes += len(b)
	}
}

func (a *app) bothStream(s grpc.ServerStream) (n int, err error) {
	for {
		var b []byte
		err := s.RecvMsg(&b)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err == nil {
			n++
			err = s.SendMsg(&b)
		}
		if err != nil {
			return n, err
		}
	}
}

// serveGRPC serves it with grpc-go's own transport, at a port of its own. Beside
// HTTP it is served by net/http's HTTP/2.
func (a *app) serveGRPC(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return a.grpcServer().Serve(l)
}

func isGRPC(r *http.Request) bool {
	return r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")
}
