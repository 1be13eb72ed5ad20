package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"time"
)

// serveTLS serves HTTPS, HTTP/1.1 and HTTP/2, with a certificate that names the
// server and that nobody signed.
func (a *app) serveTLS(addr string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: a.name}, DNSNames: []string{a.name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	if err != nil {
		return fmt.Errorf("make a certificate: %w", err)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s := &http.Server{
		Handler:   a.handler(),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	return s.ServeTLS(l, "", "")
}

// greet speaks first, as MySQL's servers do: a packet of protocol 10 with a version
// that names the server. Then it echoes.
func (a *app) greet(c net.Conn) {
	hello := append([]byte{10}, a.name...)
	hello = append(hello, 0)
	if _, err := c.Write(append([]byte{byte(len(hello)), byte(len(hello) >> 8), 0, 0}, hello...)); err != nil {
		return
	}
	io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}
