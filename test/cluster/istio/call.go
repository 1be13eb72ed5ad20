package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	_ "google.golang.org/grpc/xds"
)

// result is what became of all calls.
type result struct {
	Servers map[string]int `json:"servers"` // by who answered
	Failed  map[string]int `json:"failed"`  // by what went wrong
}

// call makes unary calls of testapp's gRPC service, for a while, and prints a result.
// The bootstrap of xDS is in GRPC_XDS_BOOTSTRAP or GRPC_XDS_BOOTSTRAP_CONFIG.
func call(args []string) error {
	f := flag.NewFlagSet("call", flag.ContinueOnError)
	lasts := f.Duration("for", 0, "how long (0: one call)")
	every := f.Duration("every", 10*time.Millisecond, "time between two calls")
	method := f.String("method", "/testapp.Echo/Unary", "of which service")
	md := metadata.MD{}
	f.Func("header", "NAME:VALUE, several times", func(s string) error {
		name, value, ok := strings.Cut(s, ":")
		if !ok {
			return fmt.Errorf("%q has no colon", s)
		}
		md.Append(name, value)
		return nil
	})
	if err := f.Parse(args); err != nil {
		return err
	}
	c, err := grpc.NewClient(f.Arg(0), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	if err != nil {
		return err
	}
	defer c.Close()
	r := result{Servers: map[string]int{}, Failed: map[string]int{}}
	for begun := time.Now(); ; time.Sleep(*every) {
		one(c, *method, md, &r)
		if time.Since(begun) >= *lasts {
			return json.NewEncoder(os.Stdout).Encode(r)
		}
	}
}

func one(c *grpc.ClientConn, method string, md metadata.MD, r *result) {
	ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(context.Background(), maps.Clone(md)), 10*time.Second)
	defer cancel()
	in, out := []byte("culvert"), []byte(nil)
	var header metadata.MD
	if err := c.Invoke(ctx, method, &in, &out, grpc.Header(&header)); err != nil {
		s, _ := status.FromError(err)
		r.Failed[s.Code().String()+": "+s.Message()]++
		return
	}
	r.Servers[strings.Join(header.Get("x-served-by"), ",")]++
}

// rawCodec leaves messages alone, see testapp.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}
