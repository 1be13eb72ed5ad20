package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
)

// app is the servers of one testapp.
type app struct {
	name string // what it answers to the question who it is
	on   string // address of its ports; empty: all
	http []string
	// certificates is the folder of tls.crt and tls.key; empty: one that nobody signed.
	certificates string
	// proxied: a header of the PROXY protocol stands before HTTP.
	proxied bool
}

func serve(args []string) error {
	a := &app{}
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	f.StringVar(&a.name, "name", "", "name to answer with (default: the host's)")
	f.StringVar(&a.on, "on", "", "address to listen at (default: all)")
	f.StringVar(&a.certificates, "certificates", "", "folder of tls.crt and tls.key for TLS (default: a certificate of its own)")
	addrs := f.String("http", "", "serve only HTTP, at these addresses")
	f.BoolVar(&a.proxied, "proxy-protocol", false, "expect a header of the PROXY protocol, version 2, before HTTP")
	if err := f.Parse(args); err != nil {
		return err
	}
	if a.name == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("find the host name: %w", err)
		}
		a.name = host
	}
	errs := make(chan error, 16)
	if *addrs != "" {
		a.http = strings.Split(*addrs, ",")
	} else {
		a.http = []string{a.at("8080")}
		for name, port := range map[string]string{"echo": "9000", "sink": "9002", "source": "9003", "greet": "9006"} {
			go func() { errs <- serveTCP(a.at(port), a.services()[name]) }()
		}
		go func() { errs <- a.serveUDP(a.at("9001")) }()
		go func() { errs <- serveBlast(a.at("9004")) }()
		go func() { errs <- a.serveGRPC(a.at("9005")) }()
		go func() { errs <- a.serveTLS(a.at("8443")) }()
	}
	for _, addr := range a.http {
		go func() { errs <- a.serveHTTP(addr) }()
	}
	log.Printf("testapp %s: http %v, on %q: echo 9000/tcp 9001/udp, sink 9002, source 9003, blasts 9004/udp, gRPC 9005, greeting 9006, TLS 8443", a.name, a.http, a.on)
	return <-errs
}

func (a *app) at(port string) string { return net.JoinHostPort(a.on, port) }

func (a *app) serveHTTP(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return a.serveHTTPAt(l)
}

// serveHTTPAt serves HTTP/1.1, HTTP/2 of clients that know of it and of such that
// ask for it with an Upgrade, and gRPC.
func (a *app) serveHTTPAt(l net.Listener) error {
	if a.proxied {
		l = proxyListener{l}
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Handler: h2c.NewHandler(a.handler(), &http2.Server{}), Protocols: &protocols, ConnContext: withRecord}
	return s.Serve(recordListener{l})
}

// services are what a TCP connection or an upgraded HTTP one can be used for.
func (a *app) services() map[string]func(net.Conn) {
	return map[string]func(net.Conn){
		"echo":   a.echo,
		"sink":   func(c net.Conn) { io.Copy(io.Discard, c) },
		"source": pour,
		"greet":  a.greet,
	}
}

// upgrade makes a stream of raw bytes of an HTTP connection (RFC 9110, section
// 7.8), for what comes by way of the API server's pods/proxy.
func upgrade(w http.ResponseWriter, f func(net.Conn)) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer c.Close()
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: testapp\r\n\r\n"); err == nil {
		f(c)
	}
}

// handler answers HTTP: what it knows of a request, checksums and byte streams.
func (a *app) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("/who", func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "%s %s\n", a.name, r.RemoteAddr)
	})
	mux.HandleFunc("PUT /sha256", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer(w, map[string]any{"sha256": hex.EncodeToString(h.Sum(nil)), "length": n, "pod": a.name})
	})
	mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		if err != nil || n < 0 {
			http.Error(w, "n must be a number of bytes", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		w.Header().Set("Content-Type", "application/octet-stream")
		io.CopyN(w, &pattern{}, n)
	})
	mux.HandleFunc("GET /slow", func(w http.ResponseWriter, r *http.Request) {
		d, err := time.ParseDuration(r.URL.Query().Get("d"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		time.Sleep(d)
		io.WriteString(w, "ok\n")
	})
	a.protocols(mux)
	for name, f := range a.services() {
		mux.HandleFunc("GET /stream/"+name, func(w http.ResponseWriter, r *http.Request) { upgrade(w, f) })
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		log.Printf("%s %s from %s", r.Method, r.URL, r.RemoteAddr)
		answer(w, map[string]any{
			"pod": a.name, "node": os.Getenv("NODE_NAME"), "remote": r.RemoteAddr,
			"method": r.Method, "host": r.Host, "path": r.URL.Path, "headers": r.Header,
		})
	})
	calls := a.grpcServer()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isGRPC(r) {
			calls.ServeHTTP(w, r)
			return
		}
		w.Header().Set(servedBy, a.name)
		mux.ServeHTTP(w, r)
	})
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// pattern is an endless stream of bytes that can be checked: byte i is i*7+i/251.
type pattern struct{ at int64 }

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(p.at*7 + p.at/251)
		p.at++
	}
	return len(b), nil
}

// echo copies plainly: the kernel's splice of a connection to itself would take two
// more descriptors for each. A connection that begins with the question is told
// who echoes.
func (a *app) echo(c net.Conn) {
	b := make([]byte, 4<<10)
	n, err := c.Read(b)
	if err != nil {
		return
	}
	first := b[:n]
	if string(first) == question {
		first = []byte(iAm(a.name, c.RemoteAddr()))
	}
	if _, err := c.Write(first); err != nil {
		return
	}
	io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, b)
}

func pour(c net.Conn) {
	b := make([]byte, 256<<10)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func serveTCP(addr string, f func(net.Conn)) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, say
			continue
		}
		go func() {
			defer c.Close()
			f(c)
		}()
	}
}

func (a *app) serveUDP(addr string) error {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	b := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(b)
		switch {
		case err != nil:
		case string(b[:n]) == question:
			pc.WriteTo([]byte(iAm(a.name, from)), from)
		default:
			pc.WriteTo(b[:n], from)
		}
	}
}
