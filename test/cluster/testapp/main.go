// Command testapp is the workload of the test cluster: servers to talk to, and
// (because its image holds no shell) the small clients used with kubectl exec
// or from the laptop.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
)

const usage = `usage: testapp COMMAND
  serve [--name NAME] [--on IP] [--http ADDR,ADDR] [--proxy-protocol]
                                       HTTP/1.1, HTTP/2, WebSocket and gRPC :8080, TCP echo :9000, UDP echo :9001, TCP sink :9002,
                                       TCP source :9003, UDP blasts :9004, gRPC alone :9005, a server that speaks first :9006, HTTPS :8443
                                       (with --http only HTTP, on those addresses)
  get [--header NAME:VALUE] [--http2] [--resolve ADDR] URL
                                       HTTP GET, body to stdout
  ask URL [--header NAME:VALUE] [--method GET] [--body BYTES] [--chunked] [--expect] [--rate BYTES] [--http2]
                                       one HTTP request, and everything about its answer as JSON
  ws URL [--header NAME:VALUE] [--conns 1] [--count 10] [--size 64] [--every 0] [--hold 0]
                                       WebSockets to /ws: messages that come back
  sse URL [--header NAME:VALUE] [--http2]
                                       server-sent events of /sse until their end
  grpc ADDR unary|server|client|both [--header NAME:VALUE] [--count 10] [--size 64] [--every 0] [--deadline 30s]
                                       one call of gRPC
  who http|tcp|udp|greet ADDR          the server's name, and the caller's address as the server sees it
  load URL [--rate 200] [--seconds 10] [--workers 20] [--timeout 10s] [--keepalive=false] [--post] [--times]
           [--header NAME:VALUE] [--http2]
                                       HTTP requests of closed-loop clients: failures, latency, who answered when
  lookup NAME                          resolve with this machine's resolver
  put URL BYTES                        send BYTES random bytes with PUT, check the SHA-256 in the answer
  udp ADDR SIZE [COUNT]                send datagrams to the UDP echo, check what comes back
  push ADDR [SECONDS [CONNS [WARM]]]   throughput to the sink (9002), not counting the first WARM seconds
  pull ADDR [SECONDS [CONNS [WARM]]]   throughput from the source (9003)
  blast ADDR up|down [SIZE [MBIT [SECONDS]]]
                                       numbered datagrams to or from the server of blasts (9004): rate and loss
  rtt ADDR [COUNT]                     1-byte round trips with the TCP echo (9000)
  ping ADDR [SECONDS [CONNS]]          the same for a time, on several connections at once
  hold ADDR SECONDS [MS]               one TCP connection to the echo, a byte every 100 ms; fails if it breaks
  conns ADDR,... [SECONDS [WORKERS]]   connections per second: connect, 1 byte echoed, close
  crowd ADDR,... COUNT SECONDS [busy]  connections that are open at once: idle and then alive, or busy with round trips
Clients take --json before their arguments.
`

// asJSON is set by --json. Results go to out.
var (
	asJSON bool
	out    io.Writer = os.Stdout
)

func main() {
	log.SetFlags(log.LstdFlags | log.Lmicroseconds)
	var args []string
	for _, a := range os.Args[1:] {
		if a == "--json" {
			asJSON = true
		} else {
			args = append(args, a)
		}
	}
	commands := map[string]func([]string) error{
		"serve": serve, "get": get, "lookup": lookup, "put": put, "udp": udp, "who": who, "load": load,
		"ask": ask, "ws": ws, "sse": sse, "grpc": rpc,
		"push": push, "pull": pull, "blast": blast, "rtt": rtt, "ping": ping, "hold": hold, "conns": conns, "crowd": crowd,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := commands[args[0]](args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "testapp %s: %v\n", strings.Join(args, " "), err)
		os.Exit(1)
	}
}

// word returns an argument that must be there.
func word(args []string, i int, what string) (string, error) {
	if i >= len(args) {
		return "", fmt.Errorf("no %s given", what)
	}
	return args[i], nil
}

// number returns a numeric argument or its default.
func number(args []string, i, def int) (int, error) {
	if i >= len(args) {
		return def, nil
	}
	n, err := strconv.Atoi(args[i])
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("%q is not a positive number", args[i])
	}
	return n, nil
}

// decimal is number for what need not be whole; its default may be 0.
func decimal(args []string, i int, def float64) (float64, error) {
	if i >= len(args) {
		return def, nil
	}
	v, err := strconv.ParseFloat(args[i], 64)
	if err != nil || v <= 0 || v > 1e6 {
		return 0, fmt.Errorf("%q is not a positive number", args[i])
	}
	return v, nil
}

// report prints a result as text or as JSON.
func report(text string, v any) error {
	if asJSON {
		return json.NewEncoder(out).Encode(v)
	}
	_, err := fmt.Fprintln(out, text)
	return err
}
